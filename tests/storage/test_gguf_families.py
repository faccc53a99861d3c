"""GGUF files of other families than Llama: tensors that stand there otherwise than in a checkpoint,
and what their blocks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq, random_weight, write_model
from tests.storage.test_gguf_model import in_gguf_order

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("here")

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 48, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    "hidden_act": "silu",
}  # fmt: skip
ATTENTION = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
MLP = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
NORMS = ("input_layernorm", "post_attention_layernorm")
BLOCK = "model.layers.0"


def tensors_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {
        f"{name}.weight": random_weight(*shape, seed=number, dtype=np.float32)
        for number, (name, shape) in enumerate(shapes.items())
    }


def llama_like(mlp: dict[str, tuple[int, ...]], norms: tuple[str, ...] = NORMS) -> dict[str, Any]:
    """Shapes by names; `mlp` inside a block."""
    inside = {f"self_attn.{name}": shape for name, shape in ATTENTION.items()} | mlp
    inside |= dict.fromkeys(norms, (64,))
    shapes = {f"{BLOCK}.{name}": shape for name, shape in inside.items()}
    return shapes | {"model.embed_tokens": (48, 64), "model.norm": (64,)}


def write_folder(kind: str, tensors: dict[str, np.ndarray], **config: Any) -> None:
    Path("model").mkdir()
    own = {"model_type": kind, **SIZES, "tie_word_embeddings": True, **config}
    Path("model/config.json").write_text(json.dumps(own))
    write_model(Path("model/model.safetensors"), tensors)


def written(*options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the tensors in the file that the model becomes, and its key-values."""
    outcome = ptq("pack", "model", "-b", 8, "-g", 32, "--format", "gguf", *options, "-o", "out")
    assert outcome.code == 0, outcome.err
    reader = gguf.GGUFReader("out/model.gguf")
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return values, {name: field.contents() for name, field in reader.fields.items()}


def read_back(folder: str, modules: list[str]) -> dict[str, np.ndarray]:
    """Weights of an output as the checkpoint had them, decoded."""
    opened = open_quantized(Path(folder))
    return {
        module: opened.layers[module].as_stored(opened.load(module).dequantized())
        if module in opened.layers
        else opened.checkpoint.read(f"{module}.weight")
        for module in modules
    }


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_experts_are_stacked_and_routers_exact() -> None:
    experts = {f"mlp.experts.{e}.{name}": shape for e in range(3) for name, shape in MLP.items()}
    shared = {f"mlp.shared_expert.{name}": shape for name, shape in MLP.items()}
    gates = {"mlp.gate": (3, 64), "mlp.shared_expert_gate": (1, 64)}
    shapes = llama_like({**experts, **shared, **gates}) | {"lm_head": (48, 64)}
    tensors = tensors_of(shapes)
    for name in ("q_proj", "k_proj", "v_proj"):
        bias = random_weight(ATTENTION[name][0], dtype=np.float32)
        tensors[f"{BLOCK}.self_attn.{name}.bias"] = bias
    write_folder(
        "qwen2_moe", tensors, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=96,
        shared_expert_intermediate_size=96, tie_word_embeddings=False,
    )  # fmt: skip
    values, keys = written()
    for own, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        stack = [tensors[f"{BLOCK}.mlp.experts.{e}.{name}.weight"] for e in range(3)]
        close(values[f"blk.0.ffn_{own}_exps.weight"], np.stack(stack))
        close(
            values[f"blk.0.ffn_{own}_shexp.weight"],
            tensors[f"{BLOCK}.mlp.shared_expert.{name}.weight"],
        )
    for own, name in (("gate_inp", "gate"), ("gate_inp_shexp", "shared_expert_gate")):
        wanted = tensors[f"{BLOCK}.mlp.{name}.weight"]
        np.testing.assert_array_equal(values[f"blk.0.ffn_{own}.weight"], wanted)
    assert {key: keys[f"qwen2moe.{key}"] for key in (
        "expert_count", "expert_used_count", "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
    )} == {
        "expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 96,
        "expert_shared_feed_forward_length": 96,
    }  # fmt: skip
    measured = ptq("eval", "model", "out", "--json").document
    Path("alone.gguf").write_bytes(Path("out/model.gguf").read_bytes())  # without config.json
    alone = ptq("eval", "model", "alone.gguf", "--json")
    assert alone.code == 0, alone.err
    assert [r["rel_err"] for r in alone.document["layers"]] == [
        r["rel_err"] for r in measured["layers"]
    ]
    assert ptq("check", "out", "--runtime", "llama.cpp", "--json").document["loads"] is True
    said = ptq("check", "out", "--runtime", "transformers", "--json").document
    assert (said["loads"], "qwen2_moe" in said["why"]) == (None, True)


@pytest.mark.parametrize(("options", "words"), [
    (("--ignore", "experts.1.w1"), "ffn_gate_exps.weight: 0 has Q8_0, 1 has floats"),
    (("--config", "recipe.toml"), "ffn_gate_exps.weight: 0 has Q8_0, 1 has Q4_0"),
])  # fmt: skip
def test_experts_of_a_block_are_quantized_alike(options: tuple[object, ...], words: str) -> None:
    experts = {
        f"block_sparse_moe.experts.{e}.{name}": shape
        for e in range(2)
        for name, shape in (("w1", (96, 64)), ("w3", (96, 64)), ("w2", (64, 96)))
    }
    shapes = llama_like({**experts, "block_sparse_moe.gate": (2, 64)}) | {"lm_head": (48, 64)}
    write_folder("mixtral", tensors_of(shapes), num_local_experts=2, tie_word_embeddings=False)
    Path("recipe.toml").write_text('[[layers]]\nmatch = "experts.1"\nbits = 4\n')
    outcome = ptq("pack", "model", "-b", 8, "-g", 32, "--format", "gguf", *options, "-o", "out")
    assert outcome.code == 1
    assert words in outcome.err
    assert not Path("out").exists()


def test_conv1d_is_transposed() -> None:
    shapes = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256)}
    shapes |= {"mlp.c_proj": (256, 64), "ln_1": (64,), "ln_2": (64,)}
    own = {f"h.0.{name}": shape for name, shape in shapes.items()}
    tensors = tensors_of({**own, "wte": (48, 64), "wpe": (32, 64), "ln_f": (64,)})
    biases = {f"h.0.{name}": shape[-1] for name, shape in shapes.items()} | {"ln_f": 64}
    for name, size in biases.items():
        tensors[f"{name}.bias"] = random_weight(size, seed=3, dtype=np.float32)
    tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)  # the mask, in old checkpoints
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 48}
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    write_model(Path("model/model.safetensors"), tensors)
    values, keys = written("--ignore", "c_fc")
    for own, name in (("attn_qkv", "attn.c_attn"), ("ffn_up", "mlp.c_fc")):
        close(values[f"blk.0.{own}.weight"], tensors[f"h.0.{name}.weight"].T)
        np.testing.assert_array_equal(values[f"blk.0.{own}.bias"], tensors[f"h.0.{name}.bias"])
    np.testing.assert_array_equal(values["position_embd.weight"], tensors["wpe.weight"])
    assert keys["gpt2.feed_forward_length"] == 256
    assert keys["gpt2.attention.layer_norm_epsilon"] == np.float32(1e-5)
    assert not any("mask" in name for name in values)
    outcome = ptq("eval", "model", "out")
    assert outcome.code == 0, outcome.err
    back = read_back("out", ["h.0.attn.c_attn", "h.0.mlp.c_fc"])
    close(back["h.0.attn.c_attn"], tensors["h.0.attn.c_attn.weight"])
    np.testing.assert_array_equal(
        back["h.0.mlp.c_fc"], tensors["h.0.mlp.c_fc.weight"].astype(np.float16)
    )


def test_gains_that_are_one_more() -> None:
    norms = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    tensors = tensors_of(llama_like({f"mlp.{name}": shape for name, shape in MLP.items()}, norms))
    tensors["model.norm.weight"][:2] = 1e-9, -1e-7  # no digits are left of these
    write_folder("gemma2", tensors, head_dim=16, query_pre_attn_scalar=16, hidden_act=None)
    values, keys = written()
    for own, name in (
        ("attn_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm"),
    ):  # fmt: skip
        wanted = tensors[f"{BLOCK}.{name}.weight"] + np.float32(1)
        np.testing.assert_array_equal(values[f"blk.0.{own}.weight"], wanted)
    assert "output.weight" not in values
    name = f"{BLOCK}.input_layernorm"
    np.testing.assert_allclose(
        read_back("out", [name])[name], tensors[f"{name}.weight"], rtol=0, atol=1e-7
    )
    assert keys["gemma2.attention.sliding_window"] == 4096
    assert keys["gemma2.final_logit_softcapping"] == 30


def test_frequencies_that_are_divided_stand_in_a_tensor() -> None:
    tensors = tensors_of(llama_like({f"mlp.{name}": shape for name, shape in MLP.items()}))
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    write_folder("llama", tensors, rope_theta=5e5, rope_scaling=scaling)
    values, keys = written()
    factors = values["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert not any("scaling" in key for key in keys)
    own = tensors[f"{BLOCK}.self_attn.k_proj.weight"]
    close(values["blk.0.attn_k.weight"], in_gguf_order(own, 2))
    assert ptq("dequantize", "out/model.gguf", "-o", "back").code == 0
    found = json.loads(Path("back/config.json").read_text())["rope_scaling"]
    assert found == scaling


def test_a_window_that_llama_cpp_has_not_ends_the_context() -> None:
    tensors = tensors_of(llama_like({f"mlp.{name}": shape for name, shape in MLP.items()}))
    write_folder("mistral", tensors, sliding_window=40)
    assert written()[1]["llama.context_length"] == 40


def test_a_tower_is_left_out_with_a_warning() -> None:
    norms = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm",
             "self_attn.q_norm", "self_attn.k_norm")  # fmt: skip
    shapes = llama_like({f"mlp.{name}": shape for name, shape in MLP.items()}, norms)
    shapes |= dict.fromkeys((f"{BLOCK}.self_attn.q_norm", f"{BLOCK}.self_attn.k_norm"), (16,))
    own = {f"language_model.{name}": shape for name, shape in shapes.items()}
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    text = {**SIZES, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16}
    write_folder("gemma3", tensors_of({**own, tower: (64, 64)}), text_config=text)
    outcome = ptq("pack", "model", "-b", 8, "-g", 32, "--format", "gguf", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert "not in the GGUF file, which holds the text model: vision_tower" in outcome.err
    names = {tensor.name for tensor in gguf.GGUFReader("out/model.gguf").tensors}
    assert len(names) == len(own)
    assert "blk.0.attn_q_norm.weight" in names


@pytest.mark.parametrize(("kind", "change", "words"), [
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, r"dense_blocks \[0\]"),
    ("gemma2", {"query_pre_attn_scalar": 24}, "score_size 24"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("gemma", {"hidden_act": "relu"}, "activation 'relu'"),
    ("cohere2", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ("smollm3", {"no_rope_layers": [0]}, r"no_rope_layers \[0\]"),
    ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ("mixtral", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_slow": 2}}, "beta_slow"),
    ("phi3", {"head_dim": 32}, "head_dim 32"),
    ("smollm3", {"no_rope_layers": [1], "attention_bias": True}, "attention_bias True"),
    ("llama", {"num_attention_heads": 0}, "does not hold 0 heads"),
    ("llama", {"num_attention_heads": 5, "head_dim": 16}, "does not hold 5 heads"),
    ("llama", {"rms_norm_eps": 1e300}, "lacks or garbles"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 0}}, "factor is 0"),
    ("llama", {"rope_scaling": {"rope_type": "mrope"}}, "rope_type 'mrope'"),
    ("granite", {"attention_multiplier": "much"}, "lacks or garbles"),
])  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(
    kind: str, change: dict[str, Any], words: str
) -> None:
    shapes = llama_like({f"mlp.{name}": shape for name, shape in MLP.items()})
    own = {"num_local_experts": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    own |= {"moe_intermediate_size": 96, "tie_word_embeddings": None}
    write_folder(kind, tensors_of(shapes), **{**own, **change})
    outcome = ptq("rtn", "model", "-b", 8, "-g", 32, "--format", "gguf", "-o", "out")
    assert outcome.code == 1
    assert words.replace("\\", "") in outcome.err
    assert not Path("out").exists()
