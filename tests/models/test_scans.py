"""Recurrences against their formulas in float64, one token of one head at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptq_cli.models.forward import scans
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.scans import causal_convolution, gated_delta_rule, mamba2_scan

# nine tokens, five behind padding, one, and seven before it
MASK = np.array([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1], [1] * 7 + [0] * 2])
PACKING = pack(MASK.shape, MASK)
RANDOM = np.random.default_rng(5)


def random_array(*shape: int) -> Any:
    return RANDOM.standard_normal((PACKING.n_tokens, *shape)).astype(np.float32)


@pytest.fixture(params=[(1, 1), (3, 1 << 17), (4, 90), (64, 1 << 17)])
def chunk(request: Any, monkeypatch: Any) -> None:
    """Tokens of a chunk, and values of the states in hand."""
    monkeypatch.setattr(scans, "TOKENS", request.param[0])
    monkeypatch.setattr(scans, "STATE", request.param[1])


@pytest.mark.parametrize("values_a_pass", [1, 20, 1 << 17])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_channel_sees_the_tokens_before_it(
    values_a_pass: int, width: int, with_bias: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(scans, "CHUNK", values_a_pass)
    inputs, kernel = random_array(5), RANDOM.standard_normal((5, width)).astype(np.float32)
    bias = RANDOM.standard_normal(5).astype(np.float32) if with_bias else None
    wanted = np.zeros(inputs.shape)
    for own in PACKING.sequences:
        for t in range(own.start, own.stop):
            for distance in range(min(width, t - own.start + 1)):
                wanted[t] += inputs[t - distance].astype(float) * kernel[:, -1 - distance]
    if bias is not None:
        wanted += bias
    found = causal_convolution(inputs, kernel, bias, PACKING)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def slow_delta_rule(q: Any, k: Any, v: Any, decay: Any, rate: Any) -> Any:
    out = np.zeros(v.shape)
    group = v.shape[1] // k.shape[1]
    q, k, v, decay, rate = (x.astype(float) for x in (q, k, v, decay, rate))
    for own in PACKING.sequences:
        for head in range(v.shape[1]):
            state = np.zeros((k.shape[2], v.shape[2]))
            for t in range(own.start, own.stop):
                key = k[t, head // group]
                state = np.exp(decay[t, head]) * state
                state = state + rate[t, head] * np.outer(key, v[t, head] - key @ state)
                out[t, head] = q[t, head // group] @ state
    return out


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("heads", [(2, 2), (2, 6), (1, 3)])
@pytest.mark.parametrize("fall", [0.0, 0.3, 60.0])
def test_the_gated_delta_rule_equals_one_token_at_a_time(
    heads: tuple[int, int], fall: float
) -> None:
    n_keys, n_heads = heads
    q, k = unit(random_array(n_keys, 6)), unit(random_array(n_keys, 6))
    k[1] = k[0]  # a token that overwrites what the one before it wrote
    v = random_array(n_heads, 5)
    decay = -fall * np.abs(random_array(n_heads))
    rate = 1 / (1 + np.exp(-random_array(n_heads)))
    found = gated_delta_rule(q, k, v, decay, rate, PACKING)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow_delta_rule(q, k, v, decay, rate), atol=3e-6)


def test_equal_keys_over_a_whole_chunk_stay_exact() -> None:
    """Each token takes back what the last one wrote: the hardest of the triangular systems."""
    packing = pack((1, 70))
    k = np.ones((70, 1, 4), dtype=np.float32) / 2
    v = RANDOM.standard_normal((70, 1, 3)).astype(np.float32)
    still, whole = np.zeros((70, 1), dtype=np.float32), np.ones((70, 1), dtype=np.float32)
    np.testing.assert_allclose(gated_delta_rule(k, k, v, still, whole, packing), v, atol=5e-6)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("groups", "heads"), [(1, 4), (2, 4), (3, 3)])
@pytest.mark.parametrize("fall", [0.0, 0.3, 60.0])
def test_mamba_equals_one_token_at_a_time(groups: int, heads: int, fall: float) -> None:
    x, dt = random_array(heads, 5), np.abs(random_array(heads))
    b, c = random_array(groups, 6), random_array(groups, 6)
    a = -fall * np.arange(1, heads + 1, dtype=np.float32)
    d = RANDOM.standard_normal(heads).astype(np.float32)
    wanted = np.zeros(x.shape)
    for own in PACKING.sequences:
        for head in range(heads):
            group, state = head * groups // heads, np.zeros((6, 5))
            for t in range(own.start, own.stop):
                state = np.exp(float(dt[t, head] * a[head])) * state
                state = state + np.outer(b[t, group], dt[t, head] * x[t, head].astype(float))
                wanted[t, head] = c[t, group] @ state + d[head] * x[t, head]
    found = mamba2_scan(x, dt, a, b, c, d, PACKING)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
