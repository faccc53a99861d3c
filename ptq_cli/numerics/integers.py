"""Integers as levels: `weight ≈ scales · (codes − zeros)`.

Every function works on any layout: `axis` is the axis along which the columns of one group lie, and
scales and zeros come back without it. Arithmetic stays in the dtype of the weight (float32 or
float64).

The level is the *centred* code, `code − zero`: the dequantized weight is one product. Where a
weight becomes a code, `clip(round(weight / scale) + zero)`, it goes through `round_centred`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Codes, FloatArray
from ptq_cli.numerics.scales import round_scales

_INTEGERS = {size: (np.dtype(f"i{size}"), np.dtype(f"u{size}")) for size in (4, 8)}

# Shrinkage of the range tried by the scale search: 1 down to 0.35: 2-bit grids want ratios below
# one half, and as closed-form refits follow, finer steps than these gain nothing.
SEARCH_RATIOS = tuple(float(ratio) for ratio in np.linspace(1.0, 0.35, 14))


def range_grid(low: FloatArray, high: FloatArray, grid: Grid) -> tuple[FloatArray, FloatArray]:
    """Scales and zeros that cover [low, high] (each group's least and greatest weight).

    Symmetric: `scale = absmax / ((2^bits − 1)/2)`, or with narrow range
    `absmax / (2^(bits−1) − 1)`; `zero = 2^(bits−1)`. Mirrored: the greatest weight by size is the
    end of the longer side, `scale = absmax / 2^(bits−1)`, the other end may be clipped: in groups
    of 128 normal weights that leaves 0.59, 0.77, 0.87 and 0.97 of the squared error at 2, 3, 4 and
    8 bits. Asymmetric: the range is widened to hold 0, `scale = (high − low)/(2^bits − 1)`,
    `zero = round(−low/scale)` kept inside the codes.
    """
    if grid.sym:
        steps = (grid.max_code - 1) / 2 if grid.narrow_range else grid.max_code / 2
        steps = grid.mid_code if grid.mirrored else steps
        scales = round_scales(np.maximum(-low, high) / low.dtype.type(steps), grid)
        zeros = np.empty_like(scales)
        zeros.fill(grid.mid_code)
        if grid.mirrored:
            zeros -= high > -low
        return scales, zeros
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    n_steps = low.dtype.type(grid.max_code)
    # Two quotients, so that high − low cannot overflow.
    scales = round_scales(high / n_steps - low / n_steps, grid)
    return scales, np.clip(np.rint(-low / scales), 0, grid.max_code)


def fit(
    weight: FloatArray, grid: Grid, axis: int, importance: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Scales and zeros of the whole range of each group; with `importance`, of the range that
    `search_grid` finds."""
    if importance is not None:
        return search_grid(weight, importance, grid, axis)
    if weight.size and axis == -1 and weight.flags.c_contiguous:
        return range_grid(*_group_range(weight), grid)
    return range_grid(weight.min(axis), weight.max(axis), grid)


def _group_range(weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """`weight.min(-1)` and `weight.max(-1)`, both widened to hold 0; NaN and inf go through.

    Integers have the faster loops, and `reduceat` less to do for each of many short groups. The
    bits of positive floats sort as integers; negative ones come before them as signed integers and
    after them as unsigned ones, the farthest from zero last.
    """
    shape, (signed, unsigned) = weight.shape[:-1], _INTEGERS[weight.itemsize]
    flat, starts = weight.reshape(-1), np.arange(0, weight.size, weight.shape[-1])
    last = np.maximum.reduceat(flat.view(unsigned), starts).view(weight.dtype)
    high = np.maximum(np.maximum.reduceat(flat.view(signed), starts), 0).view(weight.dtype)
    return np.minimum(last, 0).reshape(shape), high.reshape(shape)


def search_grid(
    weight: FloatArray, importance: FloatArray, grid: Grid, axis: int
) -> tuple[FloatArray, FloatArray]:
    """Of the ranges tried, and the zeros tried in each, the scales and zeros with the least
    weighted squared rounding error.

    weight: columns of each group along `axis`
    importance: weight of each column's squared error, broadcastable to `weight`
    """
    low, high = weight.min(axis), weight.max(axis)
    best_scales, best_zeros = range_grid(low, high, grid)
    least = np.full_like(low, np.inf)
    for scales, zeros, moves in _tried(low, high, grid):
        place = weight / np.expand_dims(scales, axis)  # of each weight among the codes
        first = grid.min_code - grid.mid_code
        if not grid.sym:
            place += np.expand_dims(zeros, axis)
            first = grid.min_code
        last = first + grid.max_code - grid.min_code
        nearest, error = np.rint(place), np.empty_like(place)
        for move in moves:  # of the zero, which moves the weights the other way
            clip_centred(nearest, first - move, last - move, out=error)
            error -= place
            error *= error
            total = _weighted_sum(error, importance, axis) * scales * scales
            moved = zeros + move
            better = (total < least) & (moved >= 0) & (moved <= grid.max_code)
            least = np.where(better, total, least)
            best_scales = np.where(better, scales, best_scales)
            best_zeros = np.where(better, moved, best_zeros)
    return best_scales, best_zeros


def _tried(
    low: FloatArray, high: FloatArray, grid: Grid
) -> Iterator[tuple[FloatArray, FloatArray, tuple[int, ...]]]:
    """Scales and zeros to try, and how far the zeros are moved from there: those of the whole
    range of a group and of shrunken ones. Asymmetric: also the zeros beside. Mirrored: both zeros;
    and besides its own whole range the ranges of symmetric groups, which keep half a step free at
    either end.
    """
    symmetric = replace(grid, mirrored=False)
    moves = ((0, -1) if grid.mirrored else (0,)) if grid.sym else (0, -1, 1)
    for ratio in SEARCH_RATIOS:
        shrink = low.dtype.type(ratio)
        scales, zeros = range_grid(low * shrink, high * shrink, symmetric)
        if grid.mirrored and ratio == 1:
            yield range_grid(low, high, grid)[0], zeros, moves
        yield scales, zeros, moves


def _weighted_sum(squares: FloatArray, importance: FloatArray, axis: int) -> FloatArray:
    """`Σ importance · squares` along the axis; `squares` are used up."""
    if importance.shape == (len(squares), 1) and axis == 0:  # a product with a vector is faster
        product: FloatArray = importance[:, 0] @ squares
        return product
    squares *= importance
    total: FloatArray = squares.sum(axis)
    return total


def limits(zeros: FloatArray, grid: Grid) -> tuple[FloatArray, FloatArray]:
    """The least and the greatest centred code of groups with these zeros."""
    return grid.min_code - zeros, grid.max_code - zeros


def round_centred(
    steps: FloatArray,
    low: FloatArray | int,
    high: FloatArray | int,
    out: FloatArray | None = None,
) -> FloatArray:
    """Centred codes nearest to `steps = weight / scale`: `clip(round(steps), low, high)`.

    low, high: the least and greatest code there is, less the zero; numbers, or broadcastable
    """
    nearest: FloatArray = np.rint(steps, out=out)
    return clip_centred(nearest, low, high, out=nearest)


def clip_centred(
    nearest: FloatArray,
    low: FloatArray | int,
    high: FloatArray | int,
    out: FloatArray | None = None,
) -> FloatArray:
    """Whole steps kept within the least and the greatest centred code."""
    if isinstance(low, int):  # numpy has a faster loop for numbers, and a slow one for arrays
        return nearest.clip(low, high, out=out)
    centred: FloatArray = np.maximum(nearest, low, out=out)
    return np.minimum(centred, high, out=centred)


def round_groups(
    weight: FloatArray,
    scale: FloatArray,
    zeros: FloatArray,
    grid: Grid,
    codes: Codes,
    decoded: FloatArray,
) -> None:
    """Codes and what they decode to of weights whose scales and zeros are known."""
    zero: FloatArray | int = zeros
    if grid.sym and not grid.mirrored:  # all are the middle
        zero = grid.mid_code
    elif grid.mirrored:  # the scale changes its sign instead: numbers are the faster limits
        mirrored, zero = zero != grid.mid_code, grid.mid_code
        scale = np.where(mirrored, -scale, scale)
    centred = np.divide(weight, scale, out=decoded)
    round_centred(centred, grid.min_code - zero, grid.max_code - zero, out=centred)
    np.add(centred, zero, out=codes, casting="unsafe")
    if grid.mirrored:  # and codes count from the other end: max_code − code
        np.bitwise_xor(codes, np.where(mirrored, grid.max_code, 0).astype(np.uint8), out=codes)
    with np.errstate(over="ignore"):  # the ends of the widest range decode to infinity
        centred *= scale
