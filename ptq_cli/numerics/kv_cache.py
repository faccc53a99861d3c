"""Keys and values as an FP8 cache holds them: E4M3 levels times a scale of the head or of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.levels import SMALL_FLOATS
from ptq_cli.core.tensors import FloatArray
from ptq_cli.numerics.scales import round_scales
from ptq_cli.numerics.small_floats import round_levels

LARGEST = SMALL_FLOATS["e4m3"].largest
_E4M3 = Grid(bits=8, levels="e4m3")
_CHUNK = 1 << 17  # values that are rounded at a time, so that they stay in cache


def cache_scales(absmax: FloatArray, per_head: bool, dtype: str) -> NDArray[np.float32]:
    """Scales that bring the largest value to the largest level, float32 [n_heads], or [1] where the
    heads share one.

    absmax: of each head, [n_heads]; dtype: the grid's word for what scales are stored in

    Raises:
        ScaleOverflow: a scale is too large for that dtype.
    """
    reach = absmax.astype(np.float32) if per_head else absmax.max(keepdims=True)
    return round_scales(reach / np.float32(LARGEST), replace(_E4M3, scale_dtype=dtype))


def used_range(absmax: FloatArray, scales: FloatArray) -> NDArray[np.float32]:
    """How much of the range up to the largest level each head uses, [n_heads]; above 1 it is
    clipped."""
    used: NDArray[np.float32] = absmax / (scales * np.float32(LARGEST))
    return used


def rounded_cache(
    key_scales: FloatArray, value_scales: FloatArray
) -> Callable[[FloatArray, FloatArray], None]:
    """What rounds keys and values in place, with scales as of `cache_scales`."""

    def round_both(keys: FloatArray, values: FloatArray) -> None:
        round_cached(keys, key_scales)
        round_cached(values, value_scales)

    return round_both


def round_cached(cached: FloatArray, scales: FloatArray) -> None:
    """Round keys or values to what the cache gives back, in place; beyond ±448 they are clipped.

    cached: float32 [n_tokens, n_heads, head_dim]; scales: float32 [n_heads] or [1]
    """
    step = max(1, _CHUNK // max(1, cached[:1].size))
    for start in range(0, len(cached), step):
        part = cached[start : start + step]
        part /= scales[:, None]
        round_levels(part, _E4M3, out=part)
        part *= scales[:, None]


def head_absmax(cached: FloatArray) -> NDArray[np.float32]:
    """The largest absolute value of each head, [n_heads]; 0 where there is no token.

    cached: float32 [n_tokens, n_heads, head_dim]
    """
    high, low = cached.max(axis=(0, 2), initial=0), cached.min(axis=(0, 2), initial=0)
    largest: NDArray[np.float32] = np.maximum(high, -low)
    return largest
