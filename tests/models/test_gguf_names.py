"""Names in GGUF, and whose rows stand in another order there."""

from __future__ import annotations

import pytest

from ptq_cli.errors import InputError
from ptq_cli.models.gguf_names import names_of_file, names_of_model


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
