"""Blocks with experts against plain twins: one token, one expert at a time, in float64."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.models.forward import architecture, attention, layers, stages
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.branch import Flow

RANDOM = np.random.default_rng(23)
MASK = np.array([[1] * 9, [0] * 4 + [1] * 5, [1] * 7 + [0] * 2])
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e4,
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN2_MOE = {
    **SIZES, "model_type": "qwen2_moe", "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}  # fmt: skip
GPT_OSS = {
    **SIZES, "model_type": "gpt_oss", "swiglu_alpha": 1.5, "swiglu_limit": 0.6,
    "sliding_window": 4, "rope_parameters": {"rope_type": "default"},
}  # fmt: skip
DEEPSEEK_V3 = {
    **SIZES, "model_type": "deepseek_v3", "moe_intermediate_size": 12, "n_shared_experts": 2,
    "n_group": 3, "topk_group": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 2.5,
}  # fmt: skip
DEEPSEEK_V2 = {
    **DEEPSEEK_V3, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy",
}  # fmt: skip
LLAMA4 = {
    **SIZES, "model_type": "llama4_text", "attention_chunk_size": 4, "floor_scale": 3,
    "attn_scale": 0.4,
}  # fmt: skip
MIXTURES = [QWEN2_MOE, GPT_OSS, DEEPSEEK_V3, DEEPSEEK_V2, LLAMA4]
NAMED = pytest.mark.parametrize("config", MIXTURES, ids=lambda config: config["model_type"])

Own = Callable[[str], Any]


def random_weights(arch: Architecture) -> dict[str, Any]:
    """Of block 0, biases and what else the families have included."""
    block = arch.blocks[0]
    mixture = block.experts
    assert mixture is not None
    n_experts, base = len(mixture.experts), "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {f"{mixture.router.name}.weight": (n_experts, 32)}
    shapes[f"{mixture.router.name}.bias"] = (n_experts,)
    shapes[f"{mixture.router.name}.e_score_correction_bias"] = (n_experts,)
    for mlp in (*mixture.experts, *filter(None, [mixture.shared])):
        for linear in mlp.inputs:
            shapes |= {
                f"{linear.name}.weight": (mlp.width, 32),
                f"{linear.name}.bias": (mlp.width,),
            }
        shapes |= {f"{mlp.output.name}.weight": (32, mlp.width), f"{mlp.output.name}.bias": (32,)}
    shapes[f"{base}mlp.shared_expert_gate.weight"] = (1, 32)
    shapes[f"{base}self_attn.sinks"] = (4,)
    for name, width in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
        shapes[f"{base}self_attn.{name}_proj.weight"] = (width, 32)
        shapes[f"{base}self_attn.{name}_proj.bias"] = (width,)
    return {
        name: (2 * RANDOM.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def through(branch: Any, packing: Any, weights: dict[str, Any], inputs: Any) -> Any:
    flow = Flow(dict.fromkeys(branch.first_sites, inputs))
    for step in branch.steps(packing, None):
        assert set(step.sites) <= set(flow.inputs)  # that of a shared expert's end is there before
        flow = step.apply(weights, flow)
    return flow.outputs


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def softmax(x: Any) -> Any:
    return np.exp(x) / np.exp(x).sum()


def slow_mlp(own: Own, path: str, x: Any) -> Any:
    gate, up = (own(f"{path}.{name}_proj.weight") @ x for name in ("gate", "up"))
    return own(f"{path}.down_proj.weight") @ (gate * sigmoid(gate) * up)


def best(ranks: Any, count: int) -> Any:
    return np.argsort(-ranks)[:count]


def slow_qwen2_moe(own: Own, x: Any) -> Any:
    share = softmax(own("mlp.gate.weight") @ x)
    out = sum(share[e] * slow_mlp(own, f"mlp.experts.{e}", x) for e in best(share, 2))
    return out + sigmoid(own("mlp.shared_expert_gate.weight") @ x) * slow_mlp(
        own, "mlp.shared_expert", x
    )


def slow_gpt_oss(own: Own, x: Any) -> Any:
    scores = own("mlp.router.weight") @ x + own("mlp.router.bias")
    chosen = best(scores, 2)
    out = np.zeros(32)
    for e, share in zip(chosen, softmax(scores[chosen]), strict=True):
        path = f"mlp.experts.{e}"
        gate, up = (
            own(f"{path}.{name}_proj.weight") @ x + own(f"{path}.{name}_proj.bias")
            for name in ("gate", "up")
        )
        gate, up = np.minimum(gate, 0.6), np.clip(up, -0.6, 0.6)
        inner = (up + 1) * gate * sigmoid(1.5 * gate)
        out += share * (own(f"{path}.down_proj.weight") @ inner + own(f"{path}.down_proj.bias"))
    return out


def in_best_groups(ranks: Any, counted: int) -> Any:
    """Three groups of two, of which two are kept; −inf elsewhere."""
    totals = np.array([np.sort(group)[-counted:].sum() for group in np.split(ranks, 3)])
    kept = best(totals, 2)
    return np.array([rank if e // 2 in kept else -np.inf for e, rank in enumerate(ranks)])


def slow_deepseek_v3(own: Own, x: Any) -> Any:
    share = sigmoid(own("mlp.gate.weight") @ x)
    ranks = in_best_groups(share + own("mlp.gate.e_score_correction_bias"), 2)
    chosen = best(ranks, 2)
    total = share[chosen].sum()
    out = sum(share[e] * slow_mlp(own, f"mlp.experts.{e}", x) for e in chosen)
    return 2.5 * out / total + slow_mlp(own, "mlp.shared_experts", x)


def slow_deepseek_v2(own: Own, x: Any) -> Any:
    share = softmax(own("mlp.gate.weight") @ x)
    chosen = best(in_best_groups(share, 1), 2)
    out = sum(share[e] * slow_mlp(own, f"mlp.experts.{e}", x) for e in chosen)
    return 2.5 * out + slow_mlp(own, "mlp.shared_experts", x)


def slow_llama4(own: Own, x: Any) -> Any:
    scores = own("feed_forward.router.weight") @ x
    out = slow_mlp(own, "feed_forward.shared_expert", x)
    for e in best(scores, 2):
        out = out + slow_mlp(own, f"feed_forward.experts.{e}", sigmoid(scores[e]) * x)
    return out


SLOW = {
    "qwen2_moe": slow_qwen2_moe, "gpt_oss": slow_gpt_oss, "deepseek_v3": slow_deepseek_v3,
    "deepseek_v2": slow_deepseek_v2, "llama4_text": slow_llama4,
}  # fmt: skip


@NAMED
def test_experts_equal_one_token_at_a_time(config: Any) -> None:
    arch = read_architecture(config)
    weights, inputs = random_weights(arch), RANDOM.standard_normal((11, 32)).astype(np.float32)
    found = through(arch.blocks[0].feed_forward, pack((1, 11)), weights, inputs)

    def own(name: str) -> Any:
        return weights[f"model.layers.0.{name}"].astype(float)

    wanted = [SLOW[config["model_type"]](own, x) for x in inputs.astype(float)]
    np.testing.assert_allclose(found, np.array(wanted), atol=1e-5)


@NAMED
def test_experts_stay_within_their_stated_memory(config: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(layers, "CHUNK", 64)
    arch = read_architecture(config)
    branch, weights = arch.blocks[0].feed_forward, random_weights(arch)
    inputs = RANDOM.standard_normal((1000, 32)).astype(np.float32)
    kept, flow = 0, Flow(dict.fromkeys(branch.first_sites, inputs))
    tracemalloc.start()
    for number, step in enumerate(branch.steps(pack((100, 10)), None)):
        if number:
            kept = max(kept, sum(x.size for x in (*flow.inputs.values(), *flow.beside.values())))
        flow = step.apply(weights, flow)
    peak = tracemalloc.get_traced_memory()[1] / 4 / 1000
    tracemalloc.stop()
    assert kept <= 1000 * branch.kept
    assert 0.3 * (branch.running + 32) < peak < branch.running + 32 + 32  # outputs; the rest


# -- attention ----------------------------------------------------------------------------------


def turn(x: Any, position: int, interleaved: bool) -> Any:
    """A head's pairs are complex numbers."""
    angles = position * 1e4 ** -(np.arange(4) / 4)
    first, second = (x[0::2], x[1::2]) if interleaved else (x[:4], x[4:])
    turned = (first + 1j * second) * np.exp(1j * angles)
    parts = turned.real, turned.imag
    return np.stack(parts, axis=-1).reshape(-1) if interleaved else np.concatenate(parts)


def slow_heads(own: Own, inputs: Any, biased: bool) -> list[Any]:
    """Queries, keys and values [n, heads, 8] of one sequence."""
    found = []
    for name in "qkv":
        outputs = inputs @ own(f"self_attn.{name}_proj.weight").T
        outputs = outputs + (own(f"self_attn.{name}_proj.bias") if biased else 0)
        found.append(outputs.reshape(len(inputs), -1, 8))
    return found


def mixed(query: Any, keys: Any, values: Any, sink: float | None = None) -> Any:
    scores = np.array([query @ key for key in keys]) / 8**0.5
    share = np.exp(scores)
    total = share.sum() + (0 if sink is None else np.exp(sink))
    return share / total @ np.array(values)


def slow_sinks(own: Own, inputs: Any, positions: Any) -> Any:
    """gpt-oss: a window of 4, and a sink in each of four heads."""
    q, k, v = slow_heads(own, inputs, biased=True)
    out = np.zeros(q.shape)
    for t in range(len(inputs)):
        seen = [j for j in range(t + 1) if positions[t] - positions[j] < 4]
        for head in range(4):
            query = turn(q[t, head], positions[t], False)
            keys = [turn(k[j, head // 2], positions[j], False) for j in seen]
            sink = own("self_attn.sinks")[head]
            out[t, head] = mixed(query, keys, [v[j, head // 2] for j in seen], sink)
    flat = out.reshape(len(inputs), -1)
    return flat @ own("self_attn.o_proj.weight").T + own("self_attn.o_proj.bias")


def slow_chunks(own: Own, inputs: Any, positions: Any) -> Any:
    """Llama 4: chunks of 4 from the first token on, queries and keys normed once turned."""

    def normed(x: Any, position: int) -> Any:
        x = turn(x, position, True)
        return x / np.sqrt(np.mean(x**2) + 1e-5)

    q, k, v = slow_heads(own, inputs, biased=False)
    out = np.zeros(q.shape)
    for t in range(len(inputs)):
        seen = [j for j in range(t + 1) if j // 4 == t // 4]
        for head in range(4):
            keys = [normed(k[j, head // 2], positions[j]) for j in seen]
            query = normed(q[t, head], positions[t])
            out[t, head] = mixed(query, keys, [v[j, head // 2] for j in seen])
    return out.reshape(len(inputs), -1) @ own("self_attn.o_proj.weight").T


def slow_tempered(own: Own, inputs: Any, positions: Any) -> Any:
    """Llama 4 where nothing is turned: queries grow every 3 tokens."""
    q, k, v = slow_heads(own, inputs, biased=False)
    out = np.zeros(q.shape)
    for t in range(len(inputs)):
        factor = 1 + 0.4 * np.log(1 + (positions[t] + 1) // 3)
        for head in range(4):
            seen = range(t + 1)
            keys, values = ([x[j, head // 2] for j in seen] for x in (k, v))
            out[t, head] = mixed(factor * q[t, head], keys, values)
    return out.reshape(len(inputs), -1) @ own("self_attn.o_proj.weight").T


@pytest.mark.parametrize(
    ("config", "slow"),
    [
        (GPT_OSS, slow_sinks),
        (LLAMA4, slow_chunks),
        ({**LLAMA4, "no_rope_layers": [0]}, slow_tempered),
    ],
    ids=["sinks", "chunks", "temperature"],
)
def test_attention_equals_one_query_at_a_time(config: Any, slow: Any) -> None:
    arch = read_architecture(config)
    mixer, weights, packing = arch.blocks[0].mixer, random_weights(arch), pack(MASK.shape, MASK)
    inputs = RANDOM.standard_normal((packing.n_tokens, 32)).astype(np.float32)
    found = through(mixer, packing, weights, inputs)

    def own(name: str) -> Any:
        return weights[f"model.layers.0.{name}"].astype(float)

    for rows in packing.sequences:
        wanted = slow(own, inputs[rows].astype(float), packing.positions[rows])
        np.testing.assert_allclose(found[rows], wanted, atol=1e-5)


@pytest.mark.parametrize("config", [GPT_OSS, LLAMA4], ids=lambda config: config["model_type"])
def test_a_block_stays_within_its_stated_memory(config: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(architecture, "WORKSPACE", 0)
    monkeypatch.setattr(attention, "QUERY_ROWS", 8)
    monkeypatch.setattr(layers, "CHUNK", 64)
    arch = read_architecture(config)
    weights, packing = random_weights(arch), pack((50, 10))
    norms = arch.blocks[0].norms.values()
    weights |= {f"{norm.name}.weight": np.ones(32, np.float32) for norm in norms}
    hidden = RANDOM.standard_normal((500, 32)).astype(np.float32)
    tracemalloc.start()
    stages.forward_block(arch, 0, weights, hidden, packing)
    peak = tracemalloc.get_traced_memory()[1] + hidden.nbytes
    tracemalloc.stop()
    assert 0.3 * arch.block_memory(500) < peak < arch.block_memory(500)


def test_which_blocks_of_a_llama_4_have_experts_chunks_and_no_turns() -> None:
    def blocks(**change: Any) -> list[tuple[bool, bool, bool]]:
        arch = read_architecture({**LLAMA4, "num_hidden_layers": 4, **change})
        return [
            (block.experts is not None, block.mixer.chunk == 4, block.mixer.rope is not None)
            for block in arch.blocks
        ]

    assert blocks() == [(True, True, True)] * 3 + [(True, False, False)]
    assert [own[0] for own in blocks(interleave_moe_layer_step=2)] == [False, True] * 2
    assert [own[0] for own in blocks(moe_layers=[0])] == [True, False, False, False]
    assert [own[1:] for own in blocks(no_rope_layers=[0, 1, 1, 0])] == [
        (False, False), (True, True), (True, True), (False, False)
    ]  # fmt: skip
    types = ["chunked_attention", "full_attention"] * 2
    assert [own[1] for own in blocks(layer_types=types)] == [True, False] * 2


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (LLAMA4, {"no_rope_layers": [1], "num_hidden_layers": 2}, ["no_rope_layers", "2 blocks"]),
        (LLAMA4, {"attention_chunk_size": None}, ["attention_chunk_size", "None"]),
        (
            {**LLAMA4, "moe_layers": []}, {"intermediate_size_mlp": "wide"},
            ["intermediate_size_mlp", "wide"],
        ),
        (GPT_OSS, {"layer_types": ["spiral"]}, ["spiral"]),
        (GPT_OSS, {"num_experts": 0}, ["num_local_experts", "0"]),
        (
            QWEN2_MOE, {"shared_expert_intermediate_size": None},
            ["shared_expert_intermediate_size", "None"],
        ),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    config: Any, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        read_architecture({**config, **change})
    assert all(word in str(caught.value) for word in words)
