"""Attention of every kind against its formula in float64, one query of one head at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptq_cli.models.forward import attention
from ptq_cli.models.forward.attention import HeadBias, alibi_slopes, attend, pack

RANDOM = np.random.default_rng(7)
HOLES = np.array([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0, 1, 1]])


def random_array(*shape: int, scale: float = 1.0) -> Any:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def slow_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: Any = None,
    slopes: Any = None,
) -> Any:
    """Padded: q [n, length, heads, d], k and v [n, length, kv, d]; one query of one head a time."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    group = q.shape[2] // k.shape[2]
    for row, i, head in np.ndindex(q.shape[:3]):
        if not mask[row, i]:
            continue
        seen = [j for j in range(i + 1) if mask[row, j] and (window is None or i - j < window)]
        if chunk is not None:
            left = int(np.argmax(mask[row]))
            seen = [j for j in seen if (j - left) // chunk == (i - left) // chunk]
        scores = scale * k[row, seen, head // group].astype(float) @ q[row, i, head].astype(float)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if slopes is not None:  # distance counts tokens, as masked columns are none
            distance = [mask[row, j + 1 : i + 1].sum() for j in seen]
            scores = scores - slopes[head] * np.array(distance)
        share = np.exp(scores - scores.max())
        total = share.sum()
        if sinks is not None:
            total += np.exp(float(sinks[head]) - scores.max())
        out[row, i, head] = share / total @ v[row, seen, head // group]
    return out


def padded_and_found(
    heads: tuple[int, int], width: int, run: Any
) -> tuple[tuple[Any, Any, Any], Any]:
    """Queries, keys and values with padding, and what `run` makes of them packed."""
    packing = pack(HOLES.shape, HOLES)
    q, k = (random_array(*HOLES.shape, n, 8) for n in heads)
    v = random_array(*HOLES.shape, heads[1], width)
    return (q, k, v), run(packing.flat(q), packing.flat(k), packing.flat(v), packing)


def check(found: Any, wanted: Any) -> None:
    wanted = pack(HOLES.shape, HOLES).flat(wanted)
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=2e-6)


@pytest.fixture
def small_blocks(monkeypatch: Any) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", 12)
    monkeypatch.setattr(attention, "SCORES", 100)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_equals_one_query_at_a_time(
    heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    padded, found = padded_and_found(
        heads, 8, lambda *qkv: attend(*qkv, scale=0.7, window=window, softcap=softcap)
    )
    check(found, slow_attention(*padded, HOLES, 0.7, window, softcap))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_takes_its_share(heads: tuple[int, int], window: int | None) -> None:
    sinks = random_array(heads[0], scale=3.0)
    sinks[0] = 200  # takes everything, without an overflow
    bias = HeadBias(sinks=sinks)
    padded, found = padded_and_found(
        heads, 8, lambda *qkv: attend(*qkv, scale=0.7, window=window, bias=bias)
    )
    assert np.isfinite(found).all()
    check(found, slow_attention(*padded, HOLES, 0.7, window, sinks=sinks.astype(float)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 3])
def test_scores_fall_with_the_distance_of_tokens(
    heads: tuple[int, int], window: int | None
) -> None:
    slopes = alibi_slopes(heads[0])
    bias = HeadBias(keys=slopes[:, None] * np.arange(HOLES.shape[1], dtype=np.float32))
    padded, found = padded_and_found(
        heads, 8, lambda *qkv: attend(*qkv, scale=0.7, window=window, bias=bias)
    )
    check(found, slow_attention(*padded, HOLES, 0.7, window, slopes=slopes))


def test_slopes_of_heads() -> None:
    """The paper's example of eight heads, and four more: every second slope of sixteen heads."""
    eight = [2.0**-n for n in range(1, 9)]
    np.testing.assert_allclose(alibi_slopes(8), eight)
    np.testing.assert_allclose(alibi_slopes(12), eight + [2.0**-n for n in (0.5, 1.5, 2.5, 3.5)])
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("width", [1, 5, 12])
def test_values_may_be_narrower_or_wider_than_keys(width: int) -> None:
    padded, found = padded_and_found((4, 2), width, lambda *qkv: attend(*qkv, scale=0.7))
    check(found, slow_attention(*padded, HOLES, 0.7))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("chunk", [1, 3, 4, 9, 50])
def test_chunked_attention_sees_its_chunk_only(chunk: int) -> None:
    padded, found = padded_and_found(
        (4, 2), 8, lambda q, k, v, packing: attend(q, k, v, packing.chunked(chunk), scale=0.7)
    )
    check(found, slow_attention(*padded, HOLES, 0.7, chunk=chunk))


def test_a_sequence_without_tokens_has_no_chunks() -> None:
    packing = pack((3, 4), np.array([[0] * 4, [1] * 4, [0] * 4])).chunked(3)
    assert packing.starts == (0, 0, 3, 4, 4)


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
