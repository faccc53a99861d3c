"""`--kv-cache`: transformers with compressed-tensors rounds what its attention caches.

What the client computes: each attention's cache is wrapped, and keys (behind their rotation) and
values are rounded to E4M3 times the stored scales on their way into it. The attention reads what
the wrapper gives back, so a prompt attends to rounded keys and values too, its own token's among
them; with `use_cache=False` there is no cache, and they are rounded all the same. Later steps read
the cache, and round the new token only. All three are our forward with the rounded cache.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import SAMPLE
from tests.interop.own_process import in_own_process

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "compressed_tensors"))),
        reason="needs the extra interop",
    ),
]

# Of each job: a model, the setting, more options. Separate q, k, v with two heads a key head; keys
# with a norm, in BF16 scales that round; one fused linear and rotations of a part of the head.
JOBS = {
    "llama": (str(SAMPLE), "fp8", "--scheme", "W4A16"),
    "qwen3": ("qwen3", "fp8-head", "--bits", "8", "--group-size", "32"),
    "phi3": ("phi3", "fp8", "--bits", "4", "--group-size", "32"),
}


def logits_of(model: Any, ids: Any) -> dict[str, Any]:
    """The client's logits of all tokens, in each of the ways that there are."""
    import torch

    tokens = torch.tensor(ids)
    with torch.no_grad():
        found = {
            "prompt": model(tokens, use_cache=True).logits,
            "without a cache": model(tokens, use_cache=False).logits,
        }
        first = model(tokens[:, :5], use_cache=True)
        steps, past = [first.logits], first.past_key_values
        for column in range(5, tokens.shape[1]):
            one = model(tokens[:, column : column + 1], past_key_values=past, use_cache=True)
            steps, past = [*steps, one.logits], one.past_key_values
        found["one by one"] = torch.cat(steps, 1)
    return {name: values.float().numpy() for name, values in found.items()}


def ours(source: Path, folder: Path, ids: Any, rounded: bool) -> Any:
    """Logits of our own forward with what the folder decodes to, and its cache rounded or not."""
    from ptq_cli.calibration.from_tokens import model_architecture
    from ptq_cli.evaluation.kv_cache import stored_caches
    from ptq_cli.evaluation.perplexity import quantized_tensors
    from ptq_cli.models.forward.attention import pack
    from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
    from ptq_cli.storage.checkpoint import open_checkpoint
    from ptq_cli.storage.folder import open_quantized

    checkpoint, quantized = open_checkpoint(source), open_quantized(folder)
    arch, packing = model_architecture(checkpoint), pack(ids.shape)
    read = quantized_tensors(checkpoint, quantized)
    caches = stored_caches([attention.module for attention in arch.attentions], quantized)
    assert len(caches) == len(arch.blocks)
    hidden = embed(arch, read, ids, packing)
    for block in range(len(arch.blocks)):
        cache = caches[block] if rounded else None
        hidden = forward_block(arch, block, read, hidden, packing, cache=cache)
    return logits(arch, read, finish(arch, read, hidden)).reshape(*ids.shape, -1)


Found = dict[str, list[tuple[str, float, float]]]


def work(folder: Path) -> Found:
    """Quantize and load every job: of each the ways, their errors, and the effect of rounding the
    cache."""
    import torch
    from transformers import AutoModelForCausalLM

    from ptq_cli.cli.main import run
    from tests.interop.tiny_models import write_models

    write_models(folder, ["qwen3", "phi3"])
    ids = np.random.default_rng(3).integers(3, 250, (2, 32))
    np.save(folder / "tokens.npy", np.random.default_rng(4).integers(3, 250, (16, 32)))
    results: Found = {name: [] for name in JOBS}
    for name, (source, kind, *options) in JOBS.items():
        model, out = folder / source, folder / f"{name}-out"
        words = ["rtn", model, "--tokens", folder / "tokens.npy", "--kv-cache", kind, *options]
        words += ["--format", "compressed-tensors", "-q", "-o", out]
        assert run([str(word) for word in words]) == 0
        client = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        exact, plain = ours(model, out, ids, True), ours(model, out, ids, False)
        size = np.sqrt((exact**2).mean())
        effect = float(np.sqrt(((plain - exact) ** 2).mean()) / size)
        for way, found in logits_of(client, ids).items():
            error = float(np.sqrt(((found - exact) ** 2).mean()) / size)
            results[name].append((way, error, effect))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return in_own_process(work, tmp_path_factory.mktemp("kv-cache"))


@pytest.mark.parametrize("name", JOBS)
def test_logits_are_those_of_the_rounded_cache(name: str, results: Any) -> None:
    assert [way for way, _, _ in results[name]] == ["prompt", "without a cache", "one by one"]
    for way, error, effect in results[name]:
        assert effect > 3e-3
        # a key that lies between two levels may be rounded to the other one
        assert error < 0.05 * effect, way
