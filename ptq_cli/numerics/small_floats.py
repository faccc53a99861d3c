"""Small floats as levels (E2M1, E4M3): `weight ≈ scales · level`.

Every function works on any layout, as those of integers.py do. A level is rounded as IEEE rounds: a
value between 2^e and 2^(e+1) to whole steps of 2^(e − mantissa bits), ties to even; below the least
normal level the steps are those at it; beyond the largest level it is clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, log2
from typing import Any

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.levels import SMALL_FLOATS, SmallFloat
from ptq_cli.core.tensors import Codes, FloatArray
from ptq_cli.numerics.scales import round_scales

# Of the scale that brings a group's greatest weight to the largest level. E2M1 has few levels, and
# those far from zero lie far apart: 1.5 brings the greatest weight from 6 to 4.
SEARCH_RATIOS = {
    "e2m1": (1.0, 1.5, 1.4, 1.3, 1.2, 1.1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7),
    "e4m3": (1.0, 1.12, 1.26, 1.41, 1.58, 1.78),
}
# Powers of two to try, beside the one of the OCP's specification.
SEARCH_EXPONENTS = (0, 1, -1)

_EXPONENT_BITS: dict[int, np.uint32 | np.uint64] = {
    4: np.uint32(0x7F80_0000),
    8: np.uint64(0x7FF0_0000_0000_0000),
}


def fit(
    weight: FloatArray, grid: Grid, axis: int, importance: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Scales, and zeros that are 0, of the whole range of each group; with `importance`, the scales
    of those tried that have the least weighted squared rounding error.

    importance: weight of each column's squared error, broadcastable to `weight`
    """
    absmax = np.maximum(-weight.min(axis), weight.max(axis))
    best = range_scales(absmax, grid)
    if importance is not None:
        best = _search(weight, importance, absmax, grid, axis)
    return best, np.zeros_like(best)


def range_scales(absmax: FloatArray, grid: Grid) -> FloatArray:
    """Scales that bring the greatest weight by size to the largest level. Powers of two:
    `2^(floor(log2 absmax) − floor(log2 largest))`, as the OCP's Microscaling specification has it
    (6.3); weights up to a binade's end are clipped."""
    largest = _small_float(grid).largest
    if grid.scale_dtype != "e8m0":
        return round_scales(absmax / absmax.dtype.type(largest), grid)
    _, exponent = np.frexp(absmax)  # absmax is in [2^(exponent − 1), 2^exponent)
    scales = np.ldexp(absmax.dtype.type(1), exponent - 1 - floor(log2(largest)))
    nothing = (absmax == 0) | ~np.isfinite(absmax)  # NaN and infinity are found there
    return round_scales(np.where(nothing, absmax, scales), grid)


def _search(
    weight: FloatArray, importance: FloatArray, absmax: FloatArray, grid: Grid, axis: int
) -> FloatArray:
    best, least = np.ones_like(absmax), np.full_like(absmax, np.inf)
    for scales in _tried(absmax, grid):
        steps = weight / np.expand_dims(scales, axis)
        error = round_levels(steps, grid)
        error -= steps
        error *= error
        error *= importance
        total = error.sum(axis) * scales * scales
        best = np.where(total < least, scales, best)
        least = np.minimum(total, least)
    return best


def _tried(absmax: FloatArray, grid: Grid) -> Iterator[FloatArray]:
    """Scales to try, that of the whole range first."""
    first = range_scales(absmax, grid)
    if grid.scale_dtype == "e8m0":
        for exponent in SEARCH_EXPONENTS:
            yield round_scales(np.ldexp(first, exponent), grid)
        return
    largest = absmax.dtype.type(_small_float(grid).largest)
    for ratio in SEARCH_RATIOS[grid.levels]:
        yield round_scales(absmax / largest * absmax.dtype.type(ratio), grid)


def round_levels(steps: FloatArray, grid: Grid, out: FloatArray | None = None) -> FloatArray:
    """The levels nearest to `steps = weight / scale`."""
    small = _small_float(grid)
    kept: FloatArray = steps.clip(-small.largest, small.largest, out=out)
    bits = _EXPONENT_BITS[kept.itemsize]
    step = (kept.view(bits.dtype) & bits).view(kept.dtype)  # 2^e, without sign and mantissa
    np.maximum(step, kept.dtype.type(2.0 ** (1 - small.bias)), out=step)
    step *= kept.dtype.type(2.0**-small.mantissa_bits)
    kept /= step
    np.rint(kept, out=kept)
    kept *= step
    return kept


def write_codes(levels: FloatArray, grid: Grid, out: Codes) -> None:
    """The codes of levels: sign, exponent and mantissa are the first bits of the float32 that lies
    as far above the least exponent."""
    small = _small_float(grid)
    aligned = levels.astype(np.float32) * np.float32(2.0 ** (small.bias - 127))
    bits = aligned.view(np.uint32)
    size = bits >> np.uint32(23 - small.mantissa_bits)
    size &= np.uint32(2 ** (small.bits - 1) - 1)
    bits >>= np.uint32(31)
    bits <<= np.uint32(small.bits - 1)
    size |= bits
    np.copyto(out, size, casting="unsafe")


def read_codes(codes: Codes, grid: Grid, dtype: np.dtype[Any]) -> FloatArray:
    """The levels that codes mean."""
    levels: FloatArray = _small_float(grid).values[codes].astype(dtype, copy=False)
    return levels


def round_groups(
    weight: FloatArray, scale: FloatArray, grid: Grid, codes: Codes, decoded: FloatArray
) -> None:
    """Codes and what they decode to of weights whose scales are known."""
    levels = np.divide(weight, scale, out=decoded)
    round_levels(levels, grid, out=levels)
    write_codes(levels, grid, codes)
    levels *= scale


def _small_float(grid: Grid) -> SmallFloat:
    return SMALL_FLOATS[grid.levels]
