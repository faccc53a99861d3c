"""GGUF files of small models: the order of biases, and dense tensors that float16 cannot hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq, random_weight, write_model

gguf = pytest.importorskip("gguf")

LAYER = "model.layers.0"
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 48, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "hidden_act": "silu", "attention_bias": True, "mlp_bias": False,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _here(here):
    """Every test in a folder of its own."""


def model(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """Writes a Llama with biases on its attention into `model`; its tensors."""
    tensors = {
        f"{LAYER}.{name}.weight": random_weight(*shape, seed=i, dtype=np.float32)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    for name, shape in SHAPES.items():
        if name.startswith("self_attn"):
            bias = random_weight(shape[0], seed=9, dtype=np.float32)
            tensors[f"{LAYER}.{name}.bias"] = bias
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = random_weight(48, 64, seed=8, dtype=np.float32)
    norms = [f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm", "model.norm"]
    tensors |= {f"{name}.weight": np.ones(64, np.float32) for name in norms} | changes
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    write_model(Path("model/model.safetensors"), tensors)
    return tensors


def written(*options: object) -> dict[str, object]:
    """The tensors of the GGUF file that the model becomes."""
    outcome = ptq("pack", "model", "-g", 32, "--format", "gguf", *options, "-o", "out")
    assert outcome.code == 0, outcome.err
    return {tensor.name: tensor for tensor in gguf.GGUFReader("out/model.gguf").tensors}


def in_gguf_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half, then row i of its second."""
    size = len(rows) // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2)
             for half in (0, 1)]  # fmt: skip
    return rows[order]


def test_biases_stand_in_the_order_of_their_weights_rows():
    tensors = model()
    found = written("-b", 8)
    for name, own, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        linear = f"{LAYER}.self_attn.{name}"
        bias, weight = found[f"blk.0.{own}.bias"], found[f"blk.0.{own}.weight"]
        wanted = in_gguf_order(tensors[f"{linear}.bias"], heads)
        np.testing.assert_array_equal(bias.data, wanted)
        decoded = gguf.dequantize(weight.data, weight.tensor_type)
        wanted = in_gguf_order(tensors[f"{linear}.weight"], heads)
        np.testing.assert_allclose(decoded, wanted, atol=1e-3)
    bias = found["blk.0.attn_v.bias"].data
    np.testing.assert_array_equal(bias, tensors[f"{LAYER}.self_attn.v_proj.bias"])


def test_check_says_that_transformers_drops_them():
    model()
    written()
    outcome = ptq("check", "out", "--runtime", "transformers")
    assert outcome.code == 3
    assert "drops the biases" in outcome.err
    assert "config=AutoConfig.from_pretrained(folder)" in outcome.err
    assert ptq("check", "out", "--runtime", "llama.cpp").code == 0


@pytest.mark.parametrize("factor", [1e-7, 1e8])
def test_dense_tensors_are_f32_where_float16_cannot_hold_a_row(factor):
    head = random_weight(48, 64, seed=8, dtype=np.float32)
    head[5] *= factor
    gate = random_weight(96, 64, seed=4, dtype=np.float32)
    gate[7] *= factor
    model(**{"lm_head.weight": head, f"{LAYER}.mlp.gate_proj.weight": gate})
    found = written("--on-misfit", "keep")
    np.testing.assert_array_equal(found["output.weight"].data, head)
    np.testing.assert_array_equal(found["blk.0.ffn_gate.weight"].data, gate)
    kinds = {name: found[f"{name}.weight"].tensor_type.name for name in
             ("token_embd", "blk.0.ffn_up", "blk.0.ffn_down")}  # fmt: skip
    assert kinds == {"token_embd": "F16", "blk.0.ffn_up": "F16", "blk.0.ffn_down": "Q4_0"}


@pytest.mark.parametrize("options", [[], ["--narrow-range"], ["-b", 8], ["--asym"]])
def test_headers_tell_less_than_the_grid(options: list[object]) -> None:
    """Whether a range is narrow, or a group mirrored, stands in no header: it is no difference."""
    model()
    assert written(*options)
    assert ptq("eval", "model", "out").code == 0
