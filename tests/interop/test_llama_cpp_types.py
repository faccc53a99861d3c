"""Every type and every mix of GGUF in llama.cpp: it computes what the NumPy forward computes with
the values that are decoded here."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_cli.commands import api
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
from ptq_cli.plan.mixes import MIXES
from ptq_cli.storage.gguf_source import open_gguf_source
from tests.builders import SAMPLE, write_model
from tests.interop.llama import NEW_TOKENS, TOKENS

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs the extra interop"),
]
WIDTH, INNER, BLOCKS, VOCABULARY = 256, 512, 2, 96
CASES = [
    *(("sample", mix, "") for mix in MIXES if mix != "Q2_K_S"),
    *(("wide", mix, "") for mix in MIXES if mix != "Q2_K_S"),
    *(("wide", "Q8_0", kind) for kind in TYPES),
]


def wide_model(folder: Path) -> Path:
    """A random Llama whose rows are whole super-blocks."""
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH)}
    for block in range(BLOCKS):
        own = f"model.layers.{block}."
        shapes |= {f"{own}self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qo"}
        shapes |= {f"{own}self_attn.{name}_proj": (WIDTH // 2, WIDTH) for name in "kv"}
        shapes |= {f"{own}mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{own}mlp.down_proj"] = (WIDTH, INNER)
    rng = np.random.default_rng(3)
    tensors = {
        f"{name}.weight": (rng.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    # a token's embedding is what predicts the one before it, so that some token is likely
    tensors["model.embed_tokens.weight"] *= 8
    tensors["lm_head.weight"] += np.roll(tensors["model.embed_tokens.weight"], 1, axis=0) / 8
    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(BLOCKS)
             for name in ("input", "post_attention")]  # fmt: skip
    tensors |= {f"{name}.weight": np.ones(WIDTH, np.float32) for name in (*norms, "model.norm")}
    config = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_model(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What llama.cpp gave for each case, and where the files are."""
    folder = tmp_path_factory.mktemp("types")
    models, jobs = {"sample": SAMPLE, "wide": wide_model(folder / "wide-model")}, []
    for model, mix, kind in CASES:
        path = folder / f"{model}-{mix}-{kind}.gguf"
        types = (f"blk={kind}",) if kind else ()
        api.rtn(models[model], scheme=mix, tensor_type=types, mse=False, output=path)
        jobs.append({"name": path.stem, "path": str(path)})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.interop.llama", folder / "jobs.json", folder / "o.npz"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent.parent)
    return folder, dict(np.load(folder / "o.npz"))


def ours(path: Path) -> NDArray[Any]:
    """Log-probabilities by the NumPy forward on what the file decodes to."""
    source = open_gguf_source(path)
    weights = {
        name: source.rows(name, shape)[:] if len(shape) == 2 else source.read(name)
        for name, shape in ((name, spec.shape) for name, spec in source.specs.items())
    }
    arch, tokens = read_architecture(source.config, weights), np.array([TOKENS])
    packing = pack(tokens.shape, None)
    hidden = embed(arch, weights, tokens, packing)
    for index in range(len(arch.blocks)):
        hidden = forward_block(arch, index, weights, hidden, packing)
    return log_softmax(logits(arch, weights, finish(arch, weights, hidden)))


def log_softmax(values: NDArray[Any]) -> NDArray[Any]:
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize(("model", "mix", "kind"), CASES)
def test_log_probabilities(model: str, mix: str, kind: str, results: Any) -> None:
    folder, found = results
    name = f"{model}-{mix}-{kind}"
    theirs, expected = log_softmax(found[name]), ours(folder / f"{name}.gguf")
    likely = expected.argmax(-1)
    error = np.abs(theirs - expected)[np.arange(len(TOKENS)), likely].max()
    same = (theirs.argmax(-1) == likely).mean()
    print(f"{name}: at most {error:.3f}, {same:.0%} equal top tokens")
    assert error < 0.1  # it rounds inputs to 8 bits
    assert same >= 0.97
    assert len(found[f"{name}.generated"]) == NEW_TOKENS
