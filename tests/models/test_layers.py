"""Attention, norms, activation functions and rotations against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ptq_cli.models.forward import attention, layers, rope
from ptq_cli.models.forward.attention import attend, pack

RANDOM = np.random.default_rng(7)
HOLES = np.array([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0, 1, 1]])


def random_array(*shape: int, scale: float = 1.0) -> Any:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


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
    found = layers.apply_norm(layers.Norm("n", 1e-5, centred=True, bias=True), weights, x)
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
