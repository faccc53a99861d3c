"""Keys and values as an FP8 cache gives them back, against slow twins."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.numerics import kv_cache
from ptq_cli.numerics.kv_cache import cache_scales, head_absmax, round_cached, used_range
from ptq_cli.numerics.scales import ScaleOverflow
from tests import oracles


def heads(n_tokens: int, n_heads: int = 3, width: int = 8) -> np.ndarray:
    values = np.random.default_rng(n_tokens).standard_normal((n_tokens, n_heads, width))
    return (values * [[[1], [30], [0.01]]]).astype(np.float32)


@pytest.mark.parametrize("shared", [True, False])
def test_every_value_becomes_the_nearest_level_times_its_heads_scale(monkeypatch, shared):
    monkeypatch.setattr(kv_cache, "_CHUNK", 50)  # several pieces, the last one short
    cached = heads(13)
    scales = np.array([0.05] if shared else [0.002, 0.0625, 0.0001], np.float32)
    found = cached.copy()
    round_cached(found, scales)
    steps = cached / scales[:, None]
    assert (np.abs(steps) > 448).any()  # some are clipped
    wanted = oracles.nearest_level(steps, "e4m3") * scales[:, None]
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_ties_go_to_even_codes():
    levels = np.array(oracles.E4M3)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32).reshape(-1, 1, 1)
    found = middles.copy()
    round_cached(found, np.ones(1, np.float32))
    even = np.where(np.arange(len(middles)) % 2 == 0, levels[:-1], levels[1:])
    np.testing.assert_array_equal(found.ravel(), even)


def test_scales_bring_the_largest_value_to_the_largest_level():
    cached = heads(40)
    absmax = head_absmax(cached)
    np.testing.assert_array_equal(absmax, np.abs(cached).max(axis=(0, 2)))
    own = cache_scales(absmax, True, "float32")
    np.testing.assert_allclose(own, absmax / 448, rtol=1e-7)
    np.testing.assert_array_equal(cache_scales(absmax, False, "float32"), own[[1]])
    np.testing.assert_allclose(used_range(absmax, own), 1, rtol=1e-6)
    np.testing.assert_allclose(used_range(absmax, own[[1]]), absmax / absmax[1], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_scales_are_those_that_are_stored(dtype, step):
    (scale,) = cache_scales(np.array([3.3], np.float32), False, dtype)
    exponent = np.floor(np.log2(3.3 / 448))
    assert scale / 2.0**exponent % (2 * step) == 0
    assert scale == pytest.approx(3.3 / 448, rel=step)


def test_heads_without_values_and_scales_that_no_dtype_holds():
    assert head_absmax(heads(1)[:0]).tolist() == [0, 0, 0]
    assert cache_scales(np.zeros(2, np.float32), True, "float16").tolist() == [1, 1]
    with pytest.raises(ScaleOverflow, match=r"a scale of 6.696e\+04 does not fit float16"):
        cache_scales(np.array([3e7], np.float32), True, "float16")
