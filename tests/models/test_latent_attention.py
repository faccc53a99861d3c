"""Multi-head latent attention against a plain twin: one query of one head at a time, in float64."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.models.forward import architecture, attention, layers, stages
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.branch import Flow
from ptq_cli.models.forward.latent_attention import LatentAttention

RANDOM = np.random.default_rng(17)
MASK = np.array([[1] * 9, [0] * 4 + [1] * 5, [1] * 7 + [0] * 2])
HEADS, STILL, TURNED, VALUE, RANK, QUERY_RANK = 4, 6, 4, 5, 12, 10
CONFIG = {
    "model_type": "deepseek_v3", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": HEADS, "q_lora_rank": QUERY_RANK,
    "kv_lora_rank": RANK, "qk_nope_head_dim": STILL, "qk_rope_head_dim": TURNED,
    "v_head_dim": VALUE, "n_routed_experts": 8, "moe_intermediate_size": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 2,
    "rms_norm_eps": 1e-3, "attention_bias": True,
}  # fmt: skip
LITE = {**CONFIG, "q_lora_rank": None}
BASE = "model.layers.1."


def random_weights(arch: Architecture) -> dict[str, Any]:
    query, block = HEADS * (STILL + TURNED), arch.blocks[1]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_a_proj.weight": (QUERY_RANK, 32), "self_attn.q_a_proj.bias": (QUERY_RANK,),
        "self_attn.q_a_layernorm.weight": (QUERY_RANK,),
        "self_attn.q_b_proj.weight": (query, QUERY_RANK), "self_attn.q_proj.weight": (query, 32),
        "self_attn.kv_a_proj_with_mqa.weight": (RANK + TURNED, 32),
        "self_attn.kv_a_proj_with_mqa.bias": (RANK + TURNED,),
        "self_attn.kv_a_layernorm.weight": (RANK,),
        "self_attn.kv_b_proj.weight": (HEADS * (STILL + VALUE), RANK),
        "self_attn.o_proj.weight": (32, HEADS * VALUE), "self_attn.o_proj.bias": (32,),
        "mlp.gate_proj.weight": (16, 32), "mlp.up_proj.weight": (16, 32),
        "mlp.down_proj.weight": (32, 16),
    }  # fmt: skip
    shapes |= {f"{norm.name.removeprefix(BASE)}.weight": (32,) for norm in block.norms.values()}
    return {
        f"{BASE}{name}": (RANDOM.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def slow_attention(inputs: Any, positions: Any, own: Any, lite: bool) -> Any:
    """One sequence [n, 32]."""

    def linear(name: str, x: Any) -> Any:
        return own(f"{name}.weight") @ x + own(f"{name}.bias")

    def norm(name: str, x: Any) -> Any:
        return own(f"{name}.weight") * x / math.sqrt(np.mean(x**2) + 1e-6)

    def turn(x: Any, position: int) -> Any:
        """Neighbours are a complex number."""
        angles = position * 1e4 ** -(np.arange(TURNED // 2) / (TURNED // 2))
        turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
        return np.stack((turned.real, turned.imag), axis=-1).reshape(-1)

    queries, keys, values = [], [], []
    for x, position in zip(inputs, positions, strict=True):
        if lite:
            query = own("q_proj.weight") @ x
        else:
            query = own("q_b_proj.weight") @ norm("q_a_layernorm", linear("q_a_proj", x))
        narrow = linear("kv_a_proj_with_mqa", x)
        both = own("kv_b_proj.weight") @ norm("kv_a_layernorm", narrow[:RANK])
        turned_key = turn(narrow[RANK:], position)
        own_query, own_key, own_value = [], [], []
        for head in range(HEADS):
            start, end = np.split(query.reshape(HEADS, -1)[head], [STILL])
            key, value = np.split(both.reshape(HEADS, -1)[head], [STILL])
            own_query.append(np.concatenate((start, turn(end, position))))
            own_key.append(np.concatenate((key, turned_key)))
            own_value.append(value)
        queries.append(own_query)
        keys.append(own_key)
        values.append(own_value)
    outputs = []
    for t in range(len(inputs)):
        heads = []
        for head in range(HEADS):
            scores = [np.dot(queries[t][head], keys[j][head]) for j in range(t + 1)]
            share = np.exp(np.array(scores) / math.sqrt(STILL + TURNED))
            mixed = sum(share[j] * values[j][head] for j in range(t + 1))
            heads.append(mixed / share.sum())
        outputs.append(linear("o_proj", np.concatenate(heads)))
    return np.array(outputs)


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["narrow queries", "queries"])
def test_it_equals_one_query_at_a_time(config: Any) -> None:
    arch = read_architecture(config)
    mixer, weights = arch.blocks[1].mixer, random_weights(arch)
    packing = pack(MASK.shape, MASK)
    inputs = RANDOM.standard_normal((packing.n_tokens, 32)).astype(np.float32)
    flow = Flow({mixer.first_sites[0]: inputs})
    for step in mixer.steps(packing, None):
        assert set(step.sites) == set(flow.inputs)
        flow = step.apply(weights, flow)
    assert flow.outputs is not None
    for own in packing.sequences:
        wanted = slow_attention(
            inputs[own].astype(float),
            packing.positions[own],
            lambda name: weights[f"{BASE}self_attn.{name}"].astype(float),
            config is LITE,
        )
        np.testing.assert_allclose(flow.outputs[own], wanted, atol=1e-5)


def test_a_step_may_be_applied_again() -> None:
    """A run applies the stages to a state that is kept, and once more with other weights."""
    arch = read_architecture(LITE)
    mixer, weights = arch.blocks[1].mixer, random_weights(arch)
    packing = pack(MASK.shape, MASK)
    inputs = RANDOM.standard_normal((packing.n_tokens, 32)).astype(np.float32)
    narrow, wide, _ = mixer.steps(packing, None)
    flow = narrow.apply(weights, Flow({mixer.first_sites[0]: inputs}))
    first, second = (wide.apply(weights, flow).inputs[f"{BASE}self_attn.o_proj"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["narrow queries", "queries"])
def test_a_block_stays_within_its_stated_memory(config: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(architecture, "WORKSPACE", 0)
    monkeypatch.setattr(attention, "QUERY_ROWS", 8)
    monkeypatch.setattr(layers, "CHUNK", 64)
    arch = read_architecture(config)
    weights, packing = random_weights(arch), pack((50, 10))
    hidden = RANDOM.standard_normal((500, 32)).astype(np.float32)
    kept = 0
    tracemalloc.start()
    state = stages.begin(arch, 1, weights, hidden)
    for stage in stages.stages(arch, 1, packing):
        flow = state.flow
        kept = max(kept, sum(x.size for x in (*flow.inputs.values(), *flow.beside.values())))
        state = stage.apply(weights, state)
    peak = tracemalloc.get_traced_memory()[1] + hidden.nbytes
    tracemalloc.stop()
    assert 0.5 * arch.block_memory(500) < peak < arch.block_memory(500)
    assert kept <= 500 * max(arch.blocks[1].kept, 32)
    assert arch.attentions == ()  # what it caches are no keys and values of heads


def test_the_scale_of_scores_and_of_stretched_positions() -> None:
    yarn = {"type": "yarn", "factor": 40, "mscale": 1.0, "original_max_position_embeddings": 16}

    def mixer(**rope: Any) -> LatentAttention:
        found = read_architecture({**CONFIG, "rope_scaling": {**yarn, **rope}}).blocks[0].mixer
        assert isinstance(found, LatentAttention)
        return found

    plain, grown = (STILL + TURNED) ** -0.5, 0.1 * math.log(40) + 1
    assert mixer().scale == pytest.approx(plain)
    assert mixer().rope.amplitude == pytest.approx(grown)
    assert mixer(mscale_all_dim=1.0).scale == pytest.approx(plain * grown**2)
    assert mixer(mscale_all_dim=1.0).rope.amplitude == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_lora_rank": None}, ["kv_lora_rank", "None"]),
        ({"q_lora_rank": 0}, ["q_lora_rank", "0"]),
        ({"n_group": 3, "first_k_dense_replace": 1}, ["8", "n_group 3"]),
        ({"topk_group": 5, "first_k_dense_replace": 1}, ["n_group 4", "topk_group 5"]),
        ({"n_shared_experts": 0, "first_k_dense_replace": 1}, ["n_shared_experts", "0"]),
        (
            {"model_type": "deepseek_v2", "topk_method": "noaux_tc", "first_k_dense_replace": 0},
            ["topk_method", "noaux_tc"],
        ),
        ({"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse"]}, ["mlp_layer_types", "2"]),
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_architecture({**CONFIG, **change})
    assert all(word in str(caught.value) for word in words)
