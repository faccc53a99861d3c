"""Every mix of GGUF's types in llama.cpp: it computes what the NumPy forward computes with
the values that are decoded here."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_cli.commands import api
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
from ptq_cli.plan.mixes import MIXES, NEEDS_IMPORTANCE
from ptq_cli.storage.gguf_file import read_gguf_header
from ptq_cli.storage.gguf_source import open_gguf_source
from tests.builders import SAMPLE, write_model
from tests.interop import ggml

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs the extra interop"),
]
WIDTH, INNER, BLOCKS, VOCABULARY = 256, 512, 2, 96
TOKENS = [int(token) for token in np.random.default_rng(11).integers(0, 90, 64)]
NEW_TOKENS = 16


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
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sample": SAMPLE, "wide": wide_model(tmp_path_factory.mktemp("wide") / "model")}


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


@pytest.mark.parametrize("mix", [name for name in MIXES if name not in NEEDS_IMPORTANCE])
@pytest.mark.parametrize("model", ["sample", "wide"])
def test_mix(model: str, mix: str, models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / f"{mix}.gguf"
    api.rtn(models[model], scheme=mix, mse=False, output=path)
    expected = ours(path)
    with ggml.opened(path, 128, expected.shape[1]) as decode:
        found = theirs = log_softmax(decode(TOKENS))
        for _ in range(NEW_TOKENS):
            found = decode([int(found[-1].argmax())])
    likely = expected.argmax(-1)
    error = np.abs(theirs - expected)[np.arange(len(TOKENS)), likely].max()
    same = (theirs.argmax(-1) == likely).mean()
    print(f"{model} {mix}: at most {error:.3f}, {same:.0%} equal top tokens")
    assert error < 0.1  # it rounds inputs to 8 bits
    assert same >= 0.97


WIDE: dict[str, dict[str, Any]] = {  # rows of whole super-blocks, but of Gemma's heads
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16},
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


@pytest.mark.skipif(not find_spec("transformers"), reason="needs the extra interop")
@pytest.mark.parametrize("kind", WIDE)
def test_a_mix_of_another_family(kind: str, tmp_path: Path) -> None:
    """Biases, an embedding that is the head, eight experts."""
    import torch

    families = pytest.importorskip("tests.interop.test_gguf_families")
    build = families._causal(kind, hidden_size=256, intermediate_size=512, **WIDE[kind])
    model = families.saved(kind.lower(), tmp_path / "model", build)
    api.rtn(tmp_path / "model", scheme="Q4_K_M", format="gguf", output=tmp_path / "out")
    tokens = families.TOKENS
    with torch.no_grad():
        logits = families.with_decoded(model, tmp_path / "out")(torch.tensor([tokens])).logits
    expected = log_softmax(logits[0].numpy())
    path = tmp_path / "out" / "model.gguf"
    worst = np.abs(log_softmax(ggml.logits(path, tokens, expected.shape[1])) - expected).max(-1)
    print(f"{kind}: at most {worst.max():.3f} of a spread of {expected.std():.2f}")
    kinds = {tensor.spec.dtype for tensor in read_gguf_header(path).tensors}
    assert {"Q4_K", "Q6_K"} <= kinds
    assert ("Q8_0" in kinds) == (kind == "Mixtral")  # k and v of eight experts
    assert (worst < 0.1).mean() >= (0.5 if kind == "Mixtral" else 1.0)  # another expert is chosen
