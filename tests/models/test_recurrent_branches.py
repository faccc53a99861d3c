"""Branches that mix tokens by a recurrence against plain twins: one token at a time, in float64."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.models.forward import architecture, layers, scans, stages
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.gated_delta import GatedDelta
from ptq_cli.models.forward.mamba import Mamba

RANDOM = np.random.default_rng(11)
MASK = np.array([[1] * 9, [0] * 4 + [1] * 5, [1] * 7 + [0] * 2])
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
QWEN3_NEXT = {
    **SIZES, "model_type": "qwen3_next", "head_dim": 8, "layer_types": ["linear_attention"] * 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
    "linear_value_head_dim": 5, "mlp_only_layers": [0, 1],
}  # fmt: skip
BAMBA = {
    **SIZES, "model_type": "bamba", "mamba_n_heads": 8, "mamba_d_state": 6, "mamba_n_groups": 2,
    "time_step_limit": [0.1, {"__float__": "Infinity"}],
}  # fmt: skip


def random_weights(arch: Architecture) -> dict[str, Any]:
    """Of both blocks, whose mixers are alike."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in arch.blocks:
        mixer, mlp = block.mixer, block.feed_forward
        linears = {linear.name: (mlp.width, 32) for linear in mlp.inputs}
        linears |= {mlp.output.name: (32, mlp.width), mixer.output.name: (32, mixer.kept)}
        if isinstance(mixer, GatedDelta):
            keys, values = mixer.n_key_heads * mixer.key_dim, mixer.kept
            linears[mixer.inputs[0].name] = (2 * keys + 2 * values, 32)
            linears[mixer.inputs[1].name] = (2 * mixer.n_heads, 32)
            channels, width = 2 * keys + values, mixer.value_dim
        else:
            groups = 2 * mixer.n_groups * mixer.state_size
            channels, width = mixer.kept + groups, mixer.kept
            linears[mixer.input.name] = (mixer.kept + channels + mixer.n_heads, 32)
        module = mixer.module
        shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{module}.conv1d.weight": (channels, 1, 4), f"{module}.norm.weight": (width,)}
        shapes |= {f"{module}.{name}": (mixer.n_heads,) for name in ("A_log", "dt_bias", "D")}
        shapes |= {f"{norm.name}.weight": (32,) for norm in block.norms.values()}
        shapes[f"{module}.conv1d.bias"] = (channels,)
    return {
        name: (RANDOM.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def rms(x: Any, eps: float) -> Any:
    return x / np.sqrt(np.mean(x**2) + eps)


def slow_convolution(mixed: Any, kernel: Any, bias: Any) -> Any:
    """One sequence [n, channels], behind silu."""
    out = np.zeros(mixed.shape) + bias
    for t in range(len(mixed)):
        for distance in range(min(4, t + 1)):
            out[t] += mixed[t - distance] * kernel[:, 0, 3 - distance]
    return out * sigmoid(out)


def slow_gated_delta(x: Any, own: Any) -> Any:
    """One sequence [n, 32]: two key heads of 6 channels, two heads of 5 for each."""
    qkvz, ba = x @ own("in_proj_qkvz.weight").T, x @ own("in_proj_ba.weight").T
    qkvz, ba = qkvz.reshape(-1, 2, 32), ba.reshape(-1, 2, 4)
    q, k, v, z = (qkvz[..., cut] for cut in (slice(6), slice(6, 12), slice(12, 22), slice(22, 32)))
    flat = np.concatenate([part.reshape(len(x), -1) for part in (q, k, v)], axis=1)
    flat = slow_convolution(flat, own("conv1d.weight"), 0)
    q, k = flat[:, :12].reshape(-1, 2, 6), flat[:, 12:24].reshape(-1, 2, 6)
    v, z = flat[:, 24:].reshape(-1, 4, 5), z.reshape(-1, 4, 5)
    out = np.zeros(v.shape)
    for head in range(4):
        key_head, state = head // 2, np.zeros((6, 5))
        for t in range(len(x)):
            rate, a = sigmoid(ba[t, key_head, head % 2]), ba[t, key_head, 2 + head % 2]
            time = np.log1p(np.exp(a + own("dt_bias")[head]))
            query = q[t, key_head] / np.sqrt(np.sum(q[t, key_head] ** 2) + 1e-6) / np.sqrt(6)
            key = k[t, key_head] / np.sqrt(np.sum(k[t, key_head] ** 2) + 1e-6)
            state = np.exp(-np.exp(own("A_log")[head]) * time) * state
            state = state + rate * np.outer(key, v[t, head] - key @ state)
            gate = z[t, head] * sigmoid(z[t, head])
            out[t, head] = rms(query @ state, 1e-6) * own("norm.weight") * gate
    return out.reshape(len(x), -1) @ own("out_proj.weight").T


def slow_mamba(x: Any, own: Any) -> Any:
    """One sequence [n, 32]: eight heads of 8 channels in two groups with 6 of b and c."""
    outputs = x @ own("in_proj.weight").T
    gate, mixed, time = outputs[:, :64], outputs[:, 64:152], outputs[:, 152:]
    mixed = slow_convolution(mixed, own("conv1d.weight"), own("conv1d.bias"))
    values, b, c = mixed[:, :64].reshape(-1, 8, 8), mixed[:, 64:76], mixed[:, 76:]
    b, c = b.reshape(-1, 2, 6), c.reshape(-1, 2, 6)
    out = np.zeros(values.shape)
    for head in range(8):
        group, state = head // 4, np.zeros((6, 8))
        for t in range(len(x)):
            dt = max(0.1, np.log1p(np.exp(time[t, head] + own("dt_bias")[head])))
            state = np.exp(-dt * np.exp(own("A_log")[head])) * state
            state = state + np.outer(b[t, group], dt * values[t, head])
            out[t, head] = c[t, group] @ state + own("D")[head] * values[t, head]
    gated = out.reshape(-1, 64) * gate * sigmoid(gate)
    normed = [np.concatenate([rms(half, 1e-5) for half in np.split(row, 2)]) for row in gated]
    return np.array(normed) * own("norm.weight") @ own("out_proj.weight").T


@pytest.mark.parametrize(
    ("config", "slow"),
    [(QWEN3_NEXT, slow_gated_delta), (BAMBA, slow_mamba)],
    ids=["delta", "mamba"],
)
def test_a_branch_equals_one_token_at_a_time(config: Any, slow: Any) -> None:
    arch = read_architecture(config)
    mixer, weights = arch.blocks[1].mixer, random_weights(arch)
    assert isinstance(mixer, GatedDelta | Mamba)
    packing = pack(MASK.shape, MASK)
    inputs = RANDOM.standard_normal((packing.n_tokens, 32)).astype(np.float32)
    flow = stages.Flow({mixer.first_sites[0]: inputs})
    for step in mixer.steps(packing, None):
        assert set(step.sites) == set(flow.inputs)
        flow = step.apply(weights, flow)
    for own in packing.sequences:
        wanted = slow(
            inputs[own].astype(float), lambda name: weights[f"{mixer.module}.{name}"].astype(float)
        )
        np.testing.assert_allclose(flow.outputs[own], wanted, atol=2e-5)


@pytest.mark.parametrize("config", [QWEN3_NEXT, BAMBA], ids=["delta", "mamba"])
def test_a_block_stays_within_its_stated_memory(config: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(architecture, "WORKSPACE", 0)
    monkeypatch.setattr(layers, "CHUNK", 64)
    monkeypatch.setattr(scans, "CHUNK", 64)
    monkeypatch.setattr(scans, "TOKENS", 4)
    arch = read_architecture({**config, "intermediate_size": 4})
    weights, packing = random_weights(arch), pack((100, 20))
    hidden = RANDOM.standard_normal((2000, 32)).astype(np.float32)
    tracemalloc.start()
    stages.forward_block(arch, 0, weights, hidden, packing)
    peak = tracemalloc.get_traced_memory()[1] + hidden.nbytes
    tracemalloc.stop()
    assert 0.5 * arch.block_memory(2000) < peak < arch.block_memory(2000)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (QWEN3_NEXT, {"linear_num_value_heads": 3}, ["3", "2"]),
        (QWEN3_NEXT, {"linear_key_head_dim": None}, ["linear_key_head_dim", "None"]),
        (QWEN3_NEXT, {"layer_types": ["spiral"] * 2}, ["spiral", "linear_attention"]),
        (BAMBA, {"mamba_n_heads": 7}, ["7", "64"]),
        (BAMBA, {"mamba_d_head": 4}, ["4", "64"]),
        (BAMBA, {"mamba_n_groups": 3}, ["8", "3"]),
        (BAMBA, {"mamba_d_state": 0}, ["mamba_d_state", "0"]),
    ],
)
def test_what_contradicts_itself_is_refused(
    config: Any, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        read_architecture({**config, **change})
    assert all(word in str(caught.value) for word in words)
