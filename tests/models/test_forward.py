"""The forward against plain twins: one query, one channel, one expert at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.models.forward import architecture, attention, layers, stages
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.ties import ties
from ptq_cli.numerics import kv_cache

RANDOM = np.random.default_rng(7)
LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
QWEN3_MOE = {
    **LLAMA, "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "head_dim": 8,
}  # fmt: skip
HOLES = np.array([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0, 1, 1]])


def random_array(*shape: int, scale: float = 1.0) -> Any:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def random_weights(arch: Architecture) -> dict[str, Any]:
    """Random tensors for a Llama-like `arch`, mixture of experts or not."""
    width = arch.hidden_size
    tensors = {arch.embedding: (arch.vocab_size, width), arch.head: (arch.vocab_size, width)}
    tensors["model.norm.weight"] = (width,)
    for block in arch.blocks:
        attention = block.attention
        assert attention is not None
        query, shared = (n * attention.head_dim for n in (attention.n_heads, attention.n_kv_heads))
        rows = (query, shared, shared)
        linears = {li.name: (n, width) for li, n in zip(attention.qkv, rows, strict=True)}
        linears[attention.output.name] = (width, query)
        if block.experts:
            linears[block.experts.router.name] = (len(block.experts.experts), width)
        for mlp in block.experts.experts if block.experts else [block.feed_forward]:
            linears |= {li.name: (mlp.width, width) for li in mlp.inputs}
            linears[mlp.output.name] = (width, mlp.width)
        tensors |= {f"{name}.weight": shape for name, shape in linears.items()}
        tensors |= {f"{norm.name}.weight": (width,) for norm in block.norms.values()}
        for norm in attention.norms.values():
            tensors[f"{norm.name}.weight"] = (attention.head_dim,)
    return {
        name: random_array(*shape, scale=shape[-1] ** -0.5) if len(shape) == 2
        else 1 + random_array(*shape, scale=0.1)
        for name, shape in tensors.items()
    }  # fmt: skip


def slow_attention(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Padded [n, length, heads, 8]; one query of one head at a time."""
    out = np.zeros(q.shape)
    for row, i, head in zip(
        *np.nonzero(np.broadcast_to(mask[..., None], q.shape[:3])), strict=True
    ):
        seen = [j for j in range(i + 1) if mask[row, j]]
        share = np.exp(k[row, seen, head // 2] @ q[row, i, head] * 8**-0.5)
        out[row, i, head] = share / share.sum() @ v[row, seen, head // 2]
    return out


def slow_rms(x: Any, weight: Any, eps: float) -> Any:
    return weight * x / np.sqrt(np.mean(x.astype(float) ** 2, axis=-1, keepdims=True) + eps)


def slow_rope(x: Any, theta: float) -> Any:
    """x [n, length, heads, d]: channels i and i + d/2 are a complex number that is turned."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None, None] * theta ** -(np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), axis=-1)


def slow_llama_block(weights: dict[str, Any], index: int, hidden: Any, mask: Any) -> Any:
    """Padded hidden [n, length, width] through a block of LLAMA."""

    def linear(name: str, x: Any) -> Any:
        return x @ weights[f"model.layers.{index}.{name}.weight"].astype(float).T

    def norm(name: str, x: Any) -> Any:
        return slow_rms(x, weights[f"model.layers.{index}.{name}.weight"], 1e-5)

    x = norm("input_layernorm", hidden)
    q, k, v = (
        linear(f"self_attn.{name}_proj", x).reshape(*mask.shape, -1, 8) for name in ("q", "k", "v")
    )
    mixed = slow_attention(slow_rope(q, 1e4), slow_rope(k, 1e4), v, mask)
    hidden = hidden + linear("self_attn.o_proj", mixed.reshape(*mask.shape, -1))
    x = norm("post_attention_layernorm", hidden)
    gate = linear("mlp.gate_proj", x)
    inner = gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", x)
    return hidden + linear("mlp.down_proj", inner)


def test_a_block_equals_the_plain_one() -> None:
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    packing = pack(HOLES.shape, HOLES)
    hidden = random_array(*HOLES.shape, 32)
    before = hidden.copy()
    found = stages.forward_block(arch, 1, weights, packing.flat(hidden), packing)
    wanted = slow_llama_block(weights, 1, hidden, HOLES)
    np.testing.assert_allclose(found, packing.flat(wanted), atol=1e-5)
    np.testing.assert_array_equal(hidden, before)


def test_sequences_do_not_see_one_another_nor_padding() -> None:
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    packing = pack(HOLES.shape, HOLES)
    hidden = random_array(*HOLES.shape, 32)
    together = np.zeros_like(hidden)
    flat = packing.flat(hidden)
    together[packing.mask] = stages.forward_block(arch, 0, weights, flat, packing)
    for row, mask in enumerate(HOLES):
        alone = pack((1, 9), mask[None])
        flat = hidden[row, mask == 1]
        found = stages.forward_block(arch, 0, weights, flat, alone)
        np.testing.assert_allclose(found, together[row, mask == 1], atol=1e-5)


def test_sites_are_observed_before_they_are_used() -> None:
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    packing = pack(HOLES.shape, HOLES)
    hidden = random_array(packing.n_tokens, 32)
    seen: dict[str, Any] = {}
    after = stages.forward_block(arch, 0, weights, hidden, packing, seen.__setitem__)
    short = [name.removeprefix("model.layers.0.") for name in seen]
    assert short == ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    down = seen["model.layers.0.mlp.down_proj"] @ weights["model.layers.0.mlp.down_proj.weight"].T
    middle = hidden + (
        seen["model.layers.0.self_attn.o_proj"]
        @ weights["model.layers.0.self_attn.o_proj.weight"].T
    )
    np.testing.assert_allclose(middle + down, after, atol=1e-5)


def test_a_stage_uses_the_weights_that_are_there_when_it_is_applied() -> None:
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    changed = {name: np.round(tensor * 4) / 4 for name, tensor in weights.items()}
    changed = {name: t if t.ndim == 2 else weights[name] for name, t in changed.items()}
    packing = pack(HOLES.shape, HOLES)
    hidden = random_array(packing.n_tokens, 32)
    state = stages.begin(arch, 0, weights, hidden)
    current = dict(weights)
    for stage in stages.stages(arch, 0, packing):
        assert list(stage.sites) == list(state.inputs)
        for linears in stage.sites.values():
            current |= {f"{name}.weight": changed[f"{name}.weight"] for name in linears}
        state = stage.apply(current.__getitem__, state)
    wanted = stages.forward_block(arch, 0, changed, hidden, packing)
    np.testing.assert_array_equal(state.hidden, wanted)


def slow_experts(arch: Architecture, weights: dict[str, Any], x: Any) -> Any:
    """One token at a time through its experts, [n, width]."""
    base = "model.layers.0.mlp."
    out = np.zeros(x.shape)
    for token, row in enumerate(x.astype(float)):
        scores = weights[f"{base}gate.weight"] @ row
        share = np.exp(scores) / np.exp(scores).sum()
        for expert in np.argsort(-share)[:2]:
            gate, up, down = (
                weights[f"{base}experts.{expert}.{part}_proj.weight"]
                for part in ("gate", "up", "down")
            )
            inner = gate @ row / (1 + np.exp(-(gate @ row))) * (up @ row)
            out[token] += share[expert] * (down @ inner)
    return out


def test_experts_equal_one_token_at_a_time_and_unused_ones_are_not_read() -> None:
    arch = read_architecture(QWEN3_MOE)
    weights = random_weights(arch)
    weights["model.layers.0.mlp.gate.weight"][3] = 0
    packing = pack((1, 4))
    hidden = random_array(4, 32)
    seen: dict[str, Any] = {}
    read: list[str] = []

    def fetch(name: str) -> Any:
        read.append(name)
        return weights[name]

    after = stages.forward_block(arch, 0, fetch, hidden, packing, seen.__setitem__)
    o_proj = "model.layers.0.self_attn.o_proj"
    middle = hidden + seen[o_proj] @ weights[f"{o_proj}.weight"].T
    x = seen["model.layers.0.mlp.gate"]
    np.testing.assert_allclose(after - middle, slow_experts(arch, weights, x), atol=1e-5)
    counts = {e: len(seen[f"model.layers.0.mlp.experts.{e}.gate_proj"]) for e in range(5)}
    assert sum(counts.values()) == 2 * 4
    for expert, count in counts.items():
        name = f"model.layers.0.mlp.experts.{expert}.down_proj"
        assert seen[name].shape == (count, 24)
        assert (f"{name}.weight" in read) == (count > 0)


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE])
def test_a_block_stays_within_its_stated_memory(config: Any, monkeypatch: Any) -> None:
    import tracemalloc

    monkeypatch.setattr(architecture, "WORKSPACE", 0)
    monkeypatch.setattr(attention, "QUERY_ROWS", 8)
    monkeypatch.setattr(layers, "CHUNK", 64)
    monkeypatch.setattr(kv_cache, "_CHUNK", 64)
    arch = read_architecture({**config, "num_hidden_layers": 1})
    weights = random_weights(arch)
    packing = pack((200, 10))
    hidden = random_array(2000, 32)
    scales = np.ones(2, np.float32)
    tracemalloc.start()
    stages.forward_block(
        arch, 0, weights, hidden, packing, cache=kv_cache.rounded_cache(scales, scales)
    )
    peak = tracemalloc.get_traced_memory()[1] + hidden.nbytes
    tracemalloc.stop()
    assert 0.3 * arch.block_memory(2000) < peak < arch.block_memory(2000)


def test_windows_fall_on_the_blocks_that_config_json_says() -> None:
    def windows(**config: Any) -> list[int | None]:
        return [x.window for x in read_architecture({**LLAMA, **config}).attentions]

    assert windows(sliding_window=8) == [None, None]
    assert windows(model_type="mistral", sliding_window=8) == [8, 8]
    assert windows(model_type="mistral", sliding_window=None) == [None, None]
    assert windows(model_type="qwen2", sliding_window=8, max_window_layers=1) == [None, None]
    on = {"use_sliding_window": True, "sliding_window": 8}
    assert windows(model_type="qwen2", max_window_layers=1, **on) == [None, 8]
    assert windows(model_type="gemma2", sliding_window=8) == [8, None]
    types = ["full_attention", "sliding_attention"]
    assert windows(model_type="gemma3_text", sliding_window=8, layer_types=types) == [None, 8]


def test_opt_has_as_many_key_heads_as_heads_whatever_config_json_says() -> None:
    config = {**LLAMA, "model_type": "opt", "ffn_dim": 48}
    assert {attention.n_kv_heads for attention in read_architecture(config).attentions} == {4}


@pytest.mark.parametrize(
    ("kind", "key", "field"),
    [
        ("granite", "embedding_multiplier", "embedding_scale"),
        ("granite", "residual_multiplier", "residual_scale"),
        ("cohere", "logit_scale", "logit_scale"),
    ],
)
@pytest.mark.parametrize("value", [0, 0.5])
def test_what_something_is_multiplied_by_may_be_0(
    kind: str, key: str, field: str, value: float
) -> None:
    arch = read_architecture({**LLAMA, "model_type": kind, key: value})
    assert getattr(arch.blocks[0] if field == "residual_scale" else arch, field) == value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ["mamba", "gemma2", "qwen3_moe", "--activations"]),
        ({"model_type": None}, ["None", "--activations"]),
        ({"hidden_act": "mish"}, ["mish", "silu"]),
        ({"num_attention_heads": 3}, ["3", "2"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"model_type": "gpt2", "num_hidden_layers": None}, ["n_layer is None"]),
        (
            {"model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 8},
            ["config.json's shared_expert_intermediate_size is None"],
        ),
        ({"num_attention_heads": 10**30}, ["num_attention_heads is 1000", "2147483647"]),
        ({"num_hidden_layers": 10**30}, ["num_hidden_layers is 1000", "2147483647"]),
        ({"num_attention_heads": 64}, ["64 attention heads", "32"]),
        ({"head_dim": "7"}, ["head_dim is '7'"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps is -1"]),
        ({"rms_norm_eps": 1e308}, ["rms_norm_eps is 1e+308", "float32"]),
        ({"rope_theta": True}, ["rope_theta is True"]),
        ({"rope_theta": float("nan")}, ["rope_theta is nan"]),
        ({"rope_scaling": "7"}, ["rope_scaling is '7'", "object"]),
        ({"rope_scaling": {"rope_type": []} | {"type": [1]}}, ["[1]", "yarn"]),
        ({"rope_scaling": {"rope_type": "yarn", "beta_fast": 0}}, ["beta_fast is 0"]),
        ({"rope_scaling": {"rope_type": "yarn", "beta_slow": "7"}}, ["beta_slow is '7'"]),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_theta": 1}, ["rope_theta is 1", "yarn"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": "abc"}},
            ["low_freq_factor is 'abc'"],
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": -1}},
            ["original_max_position_embeddings is -1"],
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 3.0},
            ["turns 24 channels of a head of 8"],
        ),
        ({"model_type": "mistral", "sliding_window": 10**30}, ["sliding_window is 1000"]),
        (
            {**QWEN3_MOE, "decoder_sparse_step": 0},
            ["decoder_sparse_step is 0"],
        ),
        ({**QWEN3_MOE, "mlp_only_layers": "7"}, ["mlp_only_layers is '7'"]),
        ({"model_type": "granite", "residual_multiplier": "7"}, ["residual_multiplier is '7'"]),
        ({"model_type": "granite", "logits_scaling": 0}, ["logits_scaling is 0"]),
        (
            {"model_type": "qwen3_next", "full_attention_interval": 0},
            ["full_attention_interval is 0"],
        ),
        ({"rope_scaling": {"rope_type": "spiral"}}, ["spiral", "yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, ["short_factor", "4"]),
        (
            {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            ["partial_rotary_factor", "0.5", "linear"],
        ),
    ],
)
def test_what_is_not_known_is_said(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_architecture({**LLAMA, **change})
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"num_experts": 10**9, "num_local_experts": 10**9}]
)
def test_more_than_there_are_tensors_is_said_at_once(change: dict[str, int]) -> None:
    tensors = random_weights(read_architecture(QWEN3_MOE))
    words = f"{max(change)} is 1000000000, but there are only {len(tensors)} tensors"
    with pytest.raises(InputError, match=words):
        read_architecture({**QWEN3_MOE, **change}, tensors)


@pytest.mark.parametrize(
    ("kind", "top", "text", "tied"),
    [
        ("llava", False, True, True), ("qwen2_5_vl", False, True, True),
        ("llama4", False, True, True), ("llava", False, False, False), ("llava", True, False, True),
        ("gemma3", False, True, False),
    ],
)  # fmt: skip
def test_heads_are_tied_as_in_transformers(kind: str, top: bool, text: bool, tied: bool) -> None:
    config = {"model_type": kind, "tie_word_embeddings": top}
    assert ties({**config, "text_config": {**LLAMA, "tie_word_embeddings": text}}) == tied


@pytest.mark.parametrize(
    "stray",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
@pytest.mark.parametrize(("kind", "turned"), [("llama", 8), ("qwen3_moe", 8), ("phi3", 4)])
def test_only_phi3_turns_a_part_of_a_head(kind: str, turned: int, stray: Any) -> None:
    experts = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 8}
    config = {**LLAMA, "model_type": kind, "head_dim": 8, **experts, **stray}
    (rope, *_) = (attention.rope for attention in read_architecture(config).attentions)
    assert rope is not None
    assert rope.dims == turned


def test_tokens_out_of_range_are_said() -> None:
    arch = read_architecture(LLAMA)
    tokens = np.array([[1, 50]])
    with pytest.raises(InputError, match="token 50 is out of range"):
        stages.embed(arch, random_weights(arch), tokens, pack(tokens.shape))
    with pytest.raises(InputError, match="mask"):
        pack((1, 2), np.ones((1, 3)))
