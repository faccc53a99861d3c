"""Names in GGUF, and whose rows stand in another order there."""

from __future__ import annotations

import re

import pytest

from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.family import Family
from ptq_cli.models.gguf_names import Placing, names_of_file, names_of_model


@pytest.mark.parametrize(("name", "stored"), [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
    ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
    ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
    ("model.layers.3.self_attn.k_proj.weight", "blk.3.attn_k.weight"),
    ("model.layers.3.self_attn.v_proj.weight", "blk.3.attn_v.weight"),
    ("model.layers.3.self_attn.o_proj.weight", "blk.3.attn_output.weight"),
    ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
    ("model.layers.3.mlp.gate_proj.weight", "blk.3.ffn_gate.weight"),
    ("model.layers.3.mlp.up_proj.weight", "blk.3.ffn_up.weight"),
    ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
])  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_names(name: str, stored: str, architecture: str) -> None:
    assert names_of_file(architecture).tensor_name(name) == stored
    assert names_of_file(architecture).module_of(stored) == name.rpartition(".")[0]


def test_names_of_qwen3_only() -> None:
    name = "model.layers.1.self_attn.q_norm.weight"
    assert names_of_file("qwen3").tensor_name(name) == "blk.1.attn_q_norm.weight"
    assert names_of_file("qwen3").module_of("blk.1.attn_q_norm.weight") == name.removesuffix(
        ".weight"
    )
    with pytest.raises(InputError, match="no name in gguf's architecture llama"):
        names_of_file("llama").tensor_name(name)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.weight", "x.weight", "lm_head.scale"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InputError, match="no name"):
        names_of_file("llama").tensor_name(name)


def test_unknown_architectures() -> None:
    with pytest.raises(InputError, match="'phi' is not known, only cohere2, gemma"):
        names_of_model({"model_type": "phi"})
    with pytest.raises(InputError, match="'phi2' is not understood"):
        names_of_file("phi2")
    with pytest.raises(InputError, match=r"'blk.0.ssm.weight' is not understood"):
        names_of_file("llama").module_of("blk.0.ssm.weight")


def test_who_is_permuted() -> None:
    base, config = "model.layers.0.self_attn.", {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama, qwen2 = names_of_file("llama"), names_of_model({"model_type": "qwen2"})
    assert llama.permuted_heads(base + "q_proj", config) == 4
    assert llama.permuted_heads(base + "k_proj", config) == 2
    assert llama.permuted_heads(base + "v_proj", config) is None
    assert qwen2.permuted_heads(base + "q_proj", config) is None
    assert llama.permuted_heads(base + "k_proj", {"num_attention_heads": 8}) == 8


def of_the_library(family: Family, module: str) -> str | None:
    """The gguf library's name for a module; llama.cpp's converter stacks experts first."""
    gguf = pytest.importorskip("gguf")
    numbers = {word: number for number, word in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[family.gguf.architecture], 2)
    return names.get_name(re.sub(r"experts\.\d+", "experts", module))


HELD = [family for family in FAMILIES if family.gguf]


@pytest.mark.parametrize("family", HELD, ids=lambda family: family.name)
def test_names_are_the_gguf_librarys(family: Family) -> None:
    names = names_of_model({"model_type": family.name})
    for module in names.modules:
        own = module.replace("{}", "1", 1).replace("{}", "0")
        stored = names.tensor_name(f"{own}.weight").removesuffix(".weight")
        assert stored == of_the_library(family, own), module


def test_experts_are_parts_of_one_tensor() -> None:
    names = names_of_model({"model_type": "mixtral"})
    expert = "model.layers.3.block_sparse_moe.experts.12.w2.weight"
    assert names.tensor_name(expert) == "blk.3.ffn_down_exps.weight"
    assert names.expert(expert) == 12
    assert names.expert("model.layers.3.block_sparse_moe.gate.weight") is None
    assert names.checkpoint_names("blk.3.ffn_down_exps.weight", (2, 64, 96)) == [
        f"model.layers.3.block_sparse_moe.experts.{number}.w2.weight" for number in range(2)
    ]
    as_in_memory = "model.layers.3.mlp.experts.12.w2.weight"
    assert names.tensor_name(as_in_memory) == "blk.3.ffn_down_exps.weight"
    called = names.called_as([as_in_memory]).checkpoint_names("blk.0.ffn_up_exps.weight", (1, 8, 8))
    assert called == ["model.layers.0.mlp.experts.0.w3.weight"]


def test_other_prefixes() -> None:
    gpt2 = names_of_model({"model_type": "gpt2"})
    for prefix in ("", "transformer."):
        assert gpt2.tensor_name(f"{prefix}wpe.weight") == "position_embd.weight"
        assert gpt2.tensor_name(f"{prefix}h.1.attn.c_attn.bias") == "blk.1.attn_qkv.bias"
        called = gpt2.called_as([f"{prefix}h.1.mlp.c_fc.weight"])
        assert called.checkpoint_names("blk.0.ffn_norm.bias", (8,)) == [f"{prefix}h.0.ln_2.bias"]
        assert gpt2.is_dropped(f"{prefix}h.1.attn.bias")
    gemma3 = names_of_model({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    for prefix in ("model.", "language_model.model.", "model.language_model."):
        name = f"{prefix}layers.0.post_feedforward_layernorm.weight"
        assert gemma3.tensor_name(name) == "blk.0.post_ffw_norm.weight"
    assert gemma3.is_dropped("vision_tower.encoder.layers.0.mlp.fc1.weight")
    assert not gemma3.is_dropped("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(("kind", "name", "wanted"), [
    ("gemma2", "model.layers.0.input_layernorm.weight", Placing(plus_one=True)),
    ("gemma", "model.norm.weight", Placing(plus_one=True)),
    ("gemma", "model.layers.0.mlp.up_proj.weight", Placing()),
    ("olmo2", "model.layers.0.self_attn.q_norm.weight", Placing()),
    ("gpt2", "transformer.h.0.attn.c_attn.weight", Placing(transposed=True)),
    ("gpt2", "transformer.h.0.attn.c_attn.bias", Placing()),
    ("gpt2", "transformer.wte.weight", Placing()),
    ("gpt2", "transformer.wpe.weight", Placing(exact=True)),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", Placing(exact=True)),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight", Placing(exact=True)),
    ("mixtral", "model.layers.0.self_attn.k_proj.weight", Placing(heads=2)),
    ("smollm3", "model.layers.0.self_attn.q_proj.bias", Placing(heads=4)),
    ("cohere2", "model.layers.0.self_attn.q_proj.weight", Placing()),
])  # fmt: skip
def test_how_tensors_stand_in_the_file(kind: str, name: str, wanted: Placing) -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert names_of_model({"model_type": kind}).placing(name, config) == wanted
