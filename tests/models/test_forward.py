"""The forward against plain twins: one query, one channel, one expert at a time, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.models import attention, forward, layers, likelihood, memory, rope
from ptq_cli.models.architecture import Architecture, read_architecture
from ptq_cli.models.attention import attend, pack

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
    width, query = arch.hidden_size, arch.n_heads * arch.head_dim
    shared = arch.n_kv_heads * arch.head_dim
    tensors = {arch.embedding: (arch.vocab_size, width), arch.head: (arch.vocab_size, width)}
    tensors["model.norm.weight"] = (width,)
    for block in arch.blocks:
        rows = (query, shared, shared)
        linears = {li.name: (n, width) for li, n in zip(block.qkv, rows, strict=True)}
        linears[block.output.name] = (width, query)
        linears |= {li.name: (arch.intermediate_size, width) for li in block.mlp_in}
        linears[block.mlp_out.name] = (width, arch.intermediate_size)
        if block.experts:
            inner = block.experts.width
            linears[block.experts.router.name] = (len(block.experts.inputs), width)
            linears |= {li.name: (inner, width) for pair in block.experts.inputs for li in pair}
            linears |= {li.name: (width, inner) for li in block.experts.outputs}
        tensors |= {f"{name}.weight": shape for name, shape in linears.items()}
        for role, norm in block.norms.items():
            tensors[f"{norm.name}.weight"] = (arch.head_dim if role in "qk" else width,)
    return {
        name: random_array(*shape, scale=shape[-1] ** -0.5) if len(shape) == 2
        else 1 + random_array(*shape, scale=0.1)
        for name, shape in tensors.items()
    }  # fmt: skip


def slow_attention(
    q: Any, k: Any, v: Any, mask: Any, scale: float, window: int | None, softcap: float | None
) -> Any:
    """Padded: q [n, length, heads, d], k and v [n, length, kv, d]; one query of one head a time."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for row, i, head in np.ndindex(q.shape[:3]):
        if not mask[row, i]:
            continue
        seen = [j for j in range(i + 1) if mask[row, j] and (window is None or i - j < window)]
        scores = scale * k[row, seen, head // group].astype(float) @ q[row, i, head].astype(float)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        share = np.exp(scores - scores.max())
        out[row, i, head] = share / share.sum() @ v[row, seen, head // group]
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
    mixed = slow_attention(slow_rope(q, 1e4), slow_rope(k, 1e4), v, mask, 8**-0.5, None, None)
    hidden = hidden + linear("self_attn.o_proj", mixed.reshape(*mask.shape, -1))
    x = norm("post_attention_layernorm", hidden)
    gate = linear("mlp.gate_proj", x)
    inner = gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", x)
    return hidden + linear("mlp.down_proj", inner)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_equals_one_query_at_a_time(
    heads: tuple[int, int], window: int | None, softcap: float | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", 12)
    monkeypatch.setattr(attention, "SCORES", 100)
    packing = pack(HOLES.shape, HOLES)
    q, k, v = (random_array(*HOLES.shape, n, 8) for n in (heads[0], heads[1], heads[1]))
    found = attend(
        packing.flat(q), packing.flat(k), packing.flat(v), packing,
        scale=0.7, window=window, softcap=softcap,
    )  # fmt: skip
    wanted = packing.flat(slow_attention(q, k, v, HOLES, 0.7, window, softcap))
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=2e-6)


@pytest.mark.parametrize("window", [None, 130, 20])
def test_attention_over_several_blocks_of_queries(window: int | None) -> None:
    mask = np.ones((1, 300), dtype=bool)
    q, k, v = (random_array(1, 300, n, 8) for n in (4, 2, 2))
    found = attend(q[0], k[0], v[0], pack(mask.shape), scale=0.4, window=window)
    wanted = slow_attention(q, k, v, mask, 0.4, window, None)
    np.testing.assert_allclose(found, wanted.reshape(300, -1), atol=2e-6)


def test_scores_of_any_size_do_not_overflow() -> None:
    q = random_array(40, 2, 8, scale=1e3)
    assert np.isfinite(attend(q, q, q, pack((2, 20)), scale=1.0)).all()


def test_a_block_equals_the_plain_one() -> None:
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    packing = pack(HOLES.shape, HOLES)
    hidden = random_array(*HOLES.shape, 32)
    before = hidden.copy()
    found = forward.forward_block(arch, 1, weights, packing.flat(hidden), packing)
    wanted = slow_llama_block(weights, 1, hidden, HOLES)
    np.testing.assert_allclose(found, packing.flat(wanted), atol=1e-5)
    np.testing.assert_array_equal(hidden, before)


def test_sequences_do_not_see_one_another_nor_padding() -> None:
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    packing = pack(HOLES.shape, HOLES)
    hidden = random_array(*HOLES.shape, 32)
    together = packing.padded(
        forward.forward_block(arch, 0, weights, packing.flat(hidden), packing)
    )
    for row, mask in enumerate(HOLES):
        alone = pack((1, 9), mask[None])
        flat = hidden[row, mask == 1]
        found = forward.forward_block(arch, 0, weights, flat, alone)
        np.testing.assert_allclose(found, together[row, mask == 1], atol=1e-5)


def test_sites_are_observed_before_they_are_used() -> None:
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    packing = pack(HOLES.shape, HOLES)
    hidden = random_array(packing.n_tokens, 32)
    seen: dict[str, Any] = {}
    after = forward.forward_block(arch, 0, weights, hidden, packing, seen.__setitem__)
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
    state = forward.begin(arch, 0, weights, hidden)
    current = dict(weights)
    for stage in forward.stages(arch, 0, packing):
        assert list(stage.sites) == list(state.inputs)
        for linears in stage.sites.values():
            current |= {f"{name}.weight": changed[f"{name}.weight"] for name in linears}
        state = stage.apply(current.__getitem__, state)
    wanted = forward.forward_block(arch, 0, changed, hidden, packing)
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

    after = forward.forward_block(arch, 0, fetch, hidden, packing, seen.__setitem__)
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

    monkeypatch.setattr(memory, "WORKSPACE", 0)
    monkeypatch.setattr(attention, "QUERY_ROWS", 8)
    monkeypatch.setattr(layers, "CHUNK", 64)
    arch = read_architecture({**config, "num_hidden_layers": 1})
    weights = random_weights(arch)
    packing = pack((200, 10))
    hidden = random_array(2000, 32)
    tracemalloc.start()
    forward.forward_block(arch, 0, weights, hidden, packing)
    peak = tracemalloc.get_traced_memory()[1] + hidden.nbytes
    tracemalloc.stop()
    assert 0.3 * memory.block_memory(arch, 2000) < peak < memory.block_memory(arch, 2000)


def test_activation_functions_equal_their_formulas() -> None:
    x = np.concatenate((np.linspace(-9, 9, 401), [-200, 200])).astype(np.float32)[None]
    wanted = {
        "silu": [v / (1 + math.exp(-v)) for v in x[0].astype(float)],
        "gelu": [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x[0].astype(float)],
        "relu": [max(v, 0.0) for v in x[0].astype(float)],
        "gelu_new": [
            0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
            for v in x[0].astype(float)
        ],
    }
    for kind, values in wanted.items():
        np.testing.assert_allclose(
            layers.activate(kind, x.copy(), None)[0], values, atol=2e-6, rtol=1e-6
        )


def test_layer_norm_equals_its_formula() -> None:
    x = random_array(5, 16) + 3
    weights = {"n.weight": random_array(16), "n.bias": random_array(16)}
    wanted = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    found = layers.apply_norm(layers.Norm("n", 1e-5, centred=True), weights, x)
    np.testing.assert_allclose(found, wanted * weights["n.weight"] + weights["n.bias"], atol=1e-5)


def frequencies(kind: str, length: int = 10, **parameters: Any) -> Any:
    settings = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    return rope.KINDS[kind](rope.read_rope(settings, 64, 128, None), length)


def test_stretched_rotations_meet_the_plain_ones_at_their_ends() -> None:
    plain = frequencies("default")
    np.testing.assert_allclose(frequencies("linear", factor=4.0), plain / 4)
    np.testing.assert_allclose(frequencies("dynamic", length=128, factor=4.0), plain)
    longer = frequencies("dynamic", length=256, factor=4.0)
    np.testing.assert_allclose(longer[-1] / plain[-1], 1 / 5)  # factor · 256/128 − (factor − 1)
    bands = {"factor": 8.0, "original_max_position_embeddings": 64}
    llama3 = frequencies("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **bands)
    yarn = frequencies("yarn", **bands)
    for stretched in (llama3, yarn):
        np.testing.assert_allclose(stretched[[0, -1]], plain[[0, -1]] / [1, 8])
        assert np.all(np.diff(stretched) < 0)


def test_windows_fall_on_the_blocks_that_config_json_says() -> None:
    def windows(**config: Any) -> list[int | None]:
        return [block.window for block in read_architecture({**LLAMA, **config}).blocks]

    assert windows(sliding_window=8) == [None, None]
    assert windows(model_type="mistral", sliding_window=8) == [8, 8]
    assert windows(model_type="mistral", sliding_window=None) == [None, None]
    assert windows(model_type="qwen2", sliding_window=8, max_window_layers=1) == [None, None]
    on = {"use_sliding_window": True, "sliding_window": 8}
    assert windows(model_type="qwen2", max_window_layers=1, **on) == [None, 8]
    assert windows(model_type="gemma2", sliding_window=8) == [8, None]
    types = ["full_attention", "sliding_attention"]
    assert windows(model_type="gemma3_text", sliding_window=8, layer_types=types) == [None, 8]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ["mamba", "gemma2", "qwen3_moe", "--activations"]),
        ({"model_type": None}, ["None", "--activations"]),
        ({"hidden_act": "mish"}, ["mish", "silu"]),
        ({"num_attention_heads": 3}, ["3", "2"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"rope_scaling": {"rope_type": "spiral"}}, ["spiral", "yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, ["short_factor", "4"]),
    ],
)
def test_what_is_not_known_is_said(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_architecture({**LLAMA, **change})
    assert all(word in str(caught.value) for word in words)


def test_tokens_out_of_range_are_said() -> None:
    arch = read_architecture(LLAMA)
    tokens = np.array([[1, 50]])
    with pytest.raises(InputError, match="token 50 is out of range"):
        forward.embed(arch, random_weights(arch), tokens, pack(tokens.shape))
    with pytest.raises(InputError, match="mask"):
        pack((1, 2), np.ones((1, 3)))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_likelihoods_in_pieces_equal_those_of_whole_rows(scale: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(likelihood, "VOCABULARY", 7)
    monkeypatch.setattr(likelihood, "LOGITS", 7 * 4)
    arch = read_architecture(LLAMA)
    weights = random_weights(arch)
    finished, other = random_array(11, 32, scale=scale), random_array(11, 32)
    targets = RANDOM.integers(0, 50, 11)
    model = likelihood.Prediction(arch, weights, finished)
    base = likelihood.Prediction(arch, weights, finished + other * 0.1)
    found = likelihood.measure_tokens(model, targets, base)

    def log_softmax(prediction: likelihood.Prediction) -> Any:
        scores = forward.logits(arch, weights, prediction.finished).astype(float)
        scores -= scores.max(axis=1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    own, wanted = log_softmax(model), log_softmax(base)
    np.testing.assert_allclose(found.nll, -own[np.arange(11), targets], atol=1e-5 * scale)
    np.testing.assert_allclose(found.reference_nll, -wanted[np.arange(11), targets], atol=1e-4)
    kl = (np.exp(wanted) * (wanted - own)).sum(axis=1)
    np.testing.assert_allclose(found.kl, kl, atol=1e-6 * scale)
    np.testing.assert_array_equal(found.top, own.argmax(axis=1))
    assert found.same_top == np.mean(own.argmax(1) == wanted.argmax(1))
    alone = likelihood.measure_tokens(model, targets)
    np.testing.assert_array_equal(alone.nll, found.nll)
    assert alone.same_top is None
    assert likelihood.measure_tokens(model, targets, model).kl.max() == 0


def test_next_tokens_stay_within_their_sequence() -> None:
    tokens = np.arange(27).reshape(3, 9)
    rows, targets = likelihood.next_tokens(tokens, pack(HOLES.shape, HOLES))
    own = pack(HOLES.shape, HOLES).flat(tokens)[rows]
    pairs = dict(zip(own.tolist(), targets.tolist(), strict=True))
    row0 = {i: i + 1 for i in range(8)}
    row1 = {11: 12, 12: 13, 13: 14, 14: 15}
    row2 = {18: 19, 19: 21, 21: 22, 22: 25, 25: 26}
    assert pairs == row0 | row1 | row2


def test_the_sample_model_predicts_its_own_language() -> None:
    import json

    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors import safe_open

    folder = Path(__file__).parents[2] / "sample_data"
    with safe_open(folder / "model.safetensors", framework="np") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    arch = read_architecture(json.loads((folder / "config.json").read_text()), weights)
    tokens = np.load(folder / "eval_tokens.npy")[:4, :96].astype(np.int64)
    packing = pack(tokens.shape)
    hidden = forward.embed(arch, weights, tokens, packing)
    for index in range(len(arch.blocks)):
        hidden = forward.forward_block(arch, index, weights, hidden, packing)
    rows, targets = likelihood.next_tokens(tokens, packing)
    finished = forward.finish(arch, weights, hidden)[rows]
    nll = likelihood.measure_tokens(likelihood.Prediction(arch, weights, finished), targets).nll
    assert nll.mean() < 0.6 * math.log(arch.vocab_size)
