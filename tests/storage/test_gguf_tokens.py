"""GGUF files as models that run: config.json by their key-values, and a forward on their tensors,
for every family that has a forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.calibration.from_tokens import model_architecture
from ptq_cli.evaluation.perplexity import quantized_tensors
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
from ptq_cli.models.gguf_keys import frequency_factors, hyperparameters
from ptq_cli.models.gguf_names import names_of_model
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.folder import open_quantized
from ptq_cli.storage.gguf_source import open_gguf_source
from tests.builders import ptq, write_model

pytestmark = pytest.mark.usefixtures("here")

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 48, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {"head_dim": 16}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "attention_factor": 1.3,
}  # fmt: skip
LONG = {
    "type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.2 * i for i in range(6)],
}  # fmt: skip
GEMMA: dict[str, Any] = {
    **SIZES, **HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {**SIZES, "sliding_window": None},
    "mixtral": {**SIZES, **EXPERTS},
    "qwen2": {**SIZES, "rope_scaling": YARN},
    "qwen3": {**SIZES, **HEADS, "tie_word_embeddings": True},
    "qwen3_moe": {
        **SIZES, **EXPERTS, "head_dim": 32, "norm_topk_prob": True, "moe_intermediate_size": 64,
        "rope_scaling": {**YARN, "attention_factor": None},
    },
    "gemma2": {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3": {
        **GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {
        **SIZES, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 32,
        "rope_scaling": LONG,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 48},
}  # fmt: skip
TOKENS = np.arange(80).reshape(2, 40) * 7 % 48
KIND = pytest.mark.parametrize("kind", MODELS)


def config_of(kind: str) -> dict[str, Any]:
    return {"model_type": kind, **MODELS[kind]}


def random_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of values that float16 holds."""
    arch, rng, found = read_architecture(config), np.random.default_rng(5), {}
    width, inner = arch.hidden_size, arch.intermediate_size
    queries, keys = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim

    def linear(module: Any, rows: int, columns: int) -> None:
        weight = rng.standard_normal((rows, columns)) / columns**0.5
        found[f"{module.name}.weight"] = weight.T if module.transposed else weight
        if module.bias:
            found[f"{module.name}.bias"] = rng.standard_normal(rows) / 10

    def norm(own: Any, size: int) -> None:
        found[f"{own.name}.weight"] = 1 - own.offset + rng.standard_normal(size) / 10
        if own.centred:
            found[f"{own.name}.bias"] = rng.standard_normal(size) / 10

    for name in {arch.embedding, arch.head}:
        found[name] = rng.standard_normal((arch.vocab_size, width)) / 8
    if arch.positions:
        found[arch.positions] = rng.standard_normal((64, width)) / 8
    norm(arch.final_norm, width)
    for block in arch.blocks:
        sizes = [queries, keys, keys] if len(block.qkv) == 3 else [queries + 2 * keys]
        for module, rows in zip(block.qkv, sizes, strict=True):
            linear(module, rows, width)
        linear(block.output, width, queries)
        for role, own in block.norms.items():
            norm(own, arch.head_dim if role in "qk" else width)
        if experts := block.experts:
            linear(experts.router, len(experts.inputs), width)
            for inputs, output in zip(experts.inputs, experts.outputs, strict=True):
                for module in inputs:
                    linear(module, experts.width, width)
                linear(output, width, experts.width)
            continue
        for module in block.mlp_in:
            linear(
                module, inner * (2 if arch.forward.gated and len(block.mlp_in) == 1 else 1), width
            )
        linear(block.mlp_out, width, inner)
    return {name: np.ascontiguousarray(x.astype(np.float16)) for name, x in found.items()}


def written(kind: str, *options: object) -> None:
    """`model`, and `out` with its GGUF file."""
    config = config_of(kind)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(config))
    write_model(Path("model/model.safetensors"), random_tensors(config))
    outcome = ptq("pack", "model", "-b", 8, "-g", 32, "--format", "gguf", *options, "-o", "out")
    assert outcome.code == 0, outcome.err


def scores(checkpoint: Any, read: Any) -> np.ndarray:
    """Logits, [tokens, vocabulary]."""
    arch, packing = model_architecture(checkpoint), pack(TOKENS.shape)
    hidden = embed(arch, read, TOKENS, packing)
    for block in range(len(arch.blocks)):
        hidden = forward_block(arch, block, read, hidden, packing)
    return np.asarray(logits(arch, read, finish(arch, read, hidden)))


def scores_of(file: str) -> np.ndarray:
    """Of a GGUF file, its matrices unrounded."""
    opened = open_gguf_source(Path(file))

    def read(name: str) -> np.ndarray:
        shape = opened.specs[name].shape
        return opened.matrix(name, shape) if len(shape) == 2 else opened.read(name)

    return scores(opened, read)


@KIND
def test_the_file_computes_what_the_folder_does(kind: str) -> None:
    written(kind)
    model, opened = open_checkpoint(Path("model")), open_gguf_source(Path("out/model.gguf"))
    assert {n: s.shape for n, s in opened.specs.items()} == {
        n: s.shape for n, s in model.specs.items()
    }
    expected = scores(model, quantized_tensors(model, open_quantized(Path("out"))))
    assert expected.std() > 0.1
    np.testing.assert_allclose(scores_of("out/model.gguf"), expected, rtol=0, atol=1e-4)
    for name in opened.specs:
        assert opened.read_bytes(name).tobytes() == opened.read(name).tobytes()


@KIND
def test_key_values_come_back(kind: str) -> None:
    written(kind)
    config, found = config_of(kind), dict(open_gguf_source(Path("out/model.gguf")).config)
    names, again = names_of_model(config), names_of_model(found)
    assert names.architecture == again.architecture
    made, keys = hyperparameters(again, found), hyperparameters(names, config)
    assert made.keys() == keys.keys()
    for key, value in keys.items():
        assert made[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6))
    factors = frequency_factors(names, config)
    for name, values in frequency_factors(again, found).items():
        np.testing.assert_allclose(values, factors.pop(name), rtol=1e-6)
    assert not factors


def test_every_family_with_a_forward_is_there() -> None:
    assert MODELS.keys() == {f.name for f in FAMILIES if f.forward and f.gguf}


TOKENS_GIVEN = ("--tokens", "tokens.npy", "--nsamples", 2, "--seq-len", 40)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma2", "gemma3", "phi3", "gpt2"])
def test_gptq_with_tokens(kind: str) -> None:
    written(kind)
    np.save("tokens.npy", TOKENS.astype(np.int32))
    options = ("--scheme", "Q4_K_M", *TOKENS_GIVEN, "--fallback", "rtn")
    outcome = ptq("gptq", "out/model.gguf", *options, "-o", "y.gguf")
    assert outcome.code == 0, outcome.err
    before, after = scores_of("out/model.gguf"), scores_of("y.gguf")
    assert 0 < np.abs(after - before).mean() < 0.5 * before.std()
    assert (
        open_gguf_source(Path("y.gguf")).config == open_gguf_source(Path("out/model.gguf")).config
    )
    evaluated = ptq("eval", "out/model.gguf", "y.gguf", *TOKENS_GIVEN, "--json")
    assert evaluated.code == 0, evaluated.err
    assert 0 < evaluated.document["quality"]["kl"]["quantized"]["mean"] < 1


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mixtral"])
def test_norms_that_take_factors_stand_in_the_file_as_before(kind: str) -> None:
    written(kind)
    np.save("tokens.npy", TOKENS.astype(np.int32))
    options = ("-b", 8, "-g", 32, "--format", "gguf", *TOKENS_GIVEN)
    outcome = ptq("awq", "out/model.gguf", *options, "-o", "y.gguf")
    assert outcome.code == 0, outcome.err
    before, after = scores_of("out/model.gguf"), scores_of("y.gguf")
    assert np.abs(after - before).mean() < 0.05 * before.std()
    first = next(
        name
        for name in open_gguf_source(Path("y.gguf")).specs
        if "input_l" in name or "ln_1.w" in name
    )
    old, new = (open_gguf_source(Path(f)).read(first) for f in ("out/model.gguf", "y.gguf"))
    assert not np.array_equal(old, new)
