"""GGUF files as models that run: config.json by their key-values, and a forward on their tensors,
for every family that has a forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.calibration.from_tokens import model_architecture
from ptq_cli.errors import InputError
from ptq_cli.evaluation.perplexity import quantized_tensors
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
from ptq_cli.models.gguf_config import model_config
from ptq_cli.models.gguf_keys import frequency_factors, hyperparameters
from ptq_cli.models.gguf_names import names_of_file, names_of_model
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.gguf_source import open_gguf_source
from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq, write_model
from tests.refusals import refused
from tests.storage.gguf_files import tensors as llama_tensors
from tests.storage.gguf_files import write_gguf_file
from tests.storage.tiny_gguf import MODELS, SIZES, config_of, random_tensors

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("here")

TOKENS = np.arange(80).reshape(2, 40) * 7 % 48
KIND = pytest.mark.parametrize("kind", MODELS)


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


def read_back(kind: str, **change: Any) -> dict[str, Any]:
    """config.json by the key-values that one was turned into. change: keys behind the
    architecture's name, None for one that is left out"""
    config = config_of(kind)
    names = names_of_model(config)
    keys = {**hyperparameters(names, config), **change}
    stated = {
        f"{names.architecture}.{key}": float(np.float32(x)) if isinstance(x, float) else x
        for key, x in keys.items()
        if x is not None
    }
    metadata = {"general.architecture": names.architecture, **stated}
    own = names_of_file(
        names.architecture, "expert_count" in keys, "attention.sliding_window" in keys
    )
    return model_config(own, metadata, 48, frequency_factors(names, config))


@KIND
def test_key_values_come_back(kind: str) -> None:
    config, found = config_of(kind), read_back(kind)
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


@pytest.mark.parametrize(("kind", "change", "words"), [
    ("gemma3", {"final_logit_softcapping": 30.0}, "softcapping is 30.0, which is not covered"),
    ("gemma2", {"attention.sliding_window": None}, "attention.sliding_window is missing"),
    ("gemma2", {"rope.scaling.type": "ntk"}, "gemma2.rope.scaling.type is 'ntk', which is not"),
    ("phi3", {"attention.sliding_window": 32}, "phi3.attention.sliding_window is 32"),
    ("phi3", {"rope.dimension_count": 8}, "'rope_factors_long.weight' does not hold 4 positive"),
    ("phi3", {"rope.dimension_count": 18}, "'rope_factors_long.weight' does not hold 9 positive"),
    ("gemma2", {"rope.dimension_count": 18}, "rope.dimension_count is 18, which is not covered"),
    ("qwen3_moe", {"expert_feed_forward_length": None}, "expert_feed_forward_length is missing"),
    ("mixtral", {"expert_used_count": 0}, "llama.expert_used_count is 0, not a whole number"),
    ("gpt2", {"attention.head_count_kv": 2}, "head_count_kv is 2, which is not covered: a gpt2"),
    ("phi3", {"attention.head_count": 2}, "do not become a config.json: gguf: head_dim 16"),
    ("qwen2", {"rope.scaling.factor": None}, "qwen2.rope.scaling.factor is missing"),
    ("qwen2", {"rope.scaling.yarn_beta_fast": 16.0}, "yarn_beta_fast is 16.0, which is not"),
    ("llama", {"rope.freq_base_swa": 1e4}, "rope.freq_base_swa is 10000.0, which is not covered"),
])  # fmt: skip
def test_what_has_no_way_back_is_refused(kind: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_back(kind, **change)
    assert words in str(refusal.value)


@pytest.mark.parametrize(("kind", "change", "wanted"), [
    ("phi3", {"attention.sliding_window": 64}, {"sliding_window": None}),  # hides nothing
    ("phi3", {"rope.scaling.type": None}, {"original_max_position_embeddings": 32}),
    ("gemma3", {"rope.freq_base_swa": None}, {"rope_local_base_freq": 10000.0}),
    ("gemma2", {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 50.0}),
    ("mixtral", {}, {"model_type": "mixtral", "num_local_experts": 3}),
    ("mistral", {}, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    ("gemma3", {}, {"model_type": "gemma3_text", "query_pre_attn_scalar": 16}),
    ("qwen3_moe", {}, {"norm_topk_prob": True, "moe_intermediate_size": 64}),
    ("gpt2", {}, {"n_embd": 64, "n_inner": 256, "activation_function": "gelu_new"}),
])  # fmt: skip
def test_words_of_config_json(kind: str, change: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = read_back(kind, **change)
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("length", [32, 1024, 8192])
def test_the_length_before_llama_3s_frequencies_were_stretched(length: int) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
    }  # fmt: skip
    config = {"model_type": "llama", **SIZES, "head_dim": 64, "rope_scaling": scaling}
    names = names_of_model(config)
    keys = {f"llama.{key}": value for key, value in hyperparameters(names, config).items()}
    keys["general.architecture"] = "llama"
    found = model_config(names, keys, 48, frequency_factors(names, config))
    assert found["rope_scaling"] == scaling


@pytest.mark.parametrize(("key", "value", "words"), [
    ("embedding_length", 256, "'token_embd.weight' is [4, 512], not [4, 256] as the key-values"),
    ("feed_forward_length", 64, "'blk.0.ffn_down.weight' is [512, 32], not [512, 64]"),
    ("attention.head_count", 1, "'blk.0.attn_q.weight' is [8, 512], not [4, 512]"),
])  # fmt: skip
def test_shapes_are_as_the_key_values_say(key: str, value: int, words: str) -> None:
    write_gguf_file(Path("m.gguf"), llama_tensors(), **{key: value})
    refused("rtn", "m.gguf", words=("m.gguf", words))


@pytest.mark.parametrize(("change", "words"), [
    ({"expert_count": 2**31}, "expert_count is 2147483648, but there are 15 tensors"),
    ({"expert_count": 5}, "is [2, 512, 32], not [5, 512, 32] as the key-values say"),
])  # fmt: skip
def test_experts_are_as_many_as_the_file_says(change: dict[str, Any], words: str) -> None:
    arrays = llama_tensors()
    for own in ("down", "up", "gate"):
        weight = arrays.pop(f"blk.0.ffn_{own}.weight")
        arrays[f"blk.0.ffn_{own}_exps.weight"] = np.stack([weight, weight])
    arrays["blk.0.ffn_gate_inp.weight"] = np.ones((2, 512), np.float32)
    write_gguf_file(Path("m.gguf"), arrays, expert_used_count=1, **change)
    refused("rtn", "m.gguf", words=("m.gguf", words))


@pytest.mark.parametrize(("name", "words"), [
    ("blk.1.attn_norm.bias", "tensor 'blk.1.attn_norm.bias' is missing"),
    ("blk.1.ffn_up.bias", "mlp.c_fc lacks its bias, which a gpt2 cannot"),
    ("position_embd.weight", "tensor 'position_embd.weight' is missing"),
])  # fmt: skip
def test_biases_are_all_there(name: str, words: str) -> None:
    names = names_of_file("gpt2")
    found = [f"{m.format(block)}.{part}" for m in names.modules for block in (0, 1)
             for part in ("weight", "bias")]  # fmt: skip
    assert names.told_by_tensors(set(found), 2) == {"tie_word_embeddings": False}
    own = names.checkpoint_names(name, (1,))
    with pytest.raises(InputError, match=words):
        names.told_by_tensors(set(found) - set(own), 2)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mixtral"])
def test_other_formats(kind: str) -> None:
    written(kind)
    assert ptq("rtn", "out/model.gguf", "-b", 8, "-g", 32, "-o", "packed").code == 0
    outcome = ptq("eval", "model", "packed", "--max-rel-err", 0.02)
    assert outcome.code == 0, outcome.err
    assert ptq("dequantize", "out/model.gguf", "-o", "back").code == 0
    shapes = {name: spec.shape for name, spec in open_checkpoint(Path("model")).specs.items()}
    assert {n: spec.shape for n, spec in open_checkpoint(Path("back")).specs.items()} == shapes


def test_every_family_with_a_forward_is_there() -> None:
    assert MODELS.keys() == {f.name for f in FAMILIES if f.forward and f.gguf}


TOKENS_GIVEN = ("--tokens", "tokens.npy", "--nsamples", 2, "--seq-len", 40)


@pytest.mark.slow(3)
@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "gpt2"])
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


@pytest.mark.slow(3)
@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_norms_that_take_factors_stand_in_the_file_as_before(kind: str) -> None:
    written(kind)
    np.save("tokens.npy", TOKENS.astype(np.int32))
    options = ("-b", 4, "-g", 32, "--format", "gguf", *TOKENS_GIVEN)
    outcome = ptq("awq", "out/model.gguf", *options, "-o", "y")
    assert outcome.code == 0, outcome.err
    before, after = scores_of("out/model.gguf"), scores_of("y/model.gguf")
    assert np.abs(after - before).mean() < 0.5 * before.std()
    old, new = (open_gguf_source(Path(f"{folder}/model.gguf")) for folder in ("out", "y"))
    norms = [name for name in new.specs if name.endswith(("input_layernorm.weight", "ln_1.weight"))]
    assert not all(np.array_equal(old.read(norm), new.read(norm)) for norm in norms)
