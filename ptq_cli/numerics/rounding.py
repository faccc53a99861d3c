"""Scales, zeros and rounding: `weight ≈ scales · (codes − zeros)`.

Every function works on any layout: `axis` is the axis along which the columns of one group lie, and
scales and zeros come back without it. Arithmetic stays in the dtype of the weight (float32 or
float64); scales are rounded to the dtype they are stored in before a code is chosen, so what a
runtime decodes is what was optimised.

Inside the engine codes are *centred*, `codes − zeros`: the dequantized weight is one product. Where
a weight becomes a code, `clip(round(weight / scale) + zero)`, it goes through `round_centred`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Codes, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.numerics.parallel import each, pieces

_INTEGERS = {size: (np.dtype(f"i{size}"), np.dtype(f"u{size}")) for size in (4, 8)}

SCALE_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

# Smallest positive value a stored scale may take (float16: its subnormals, which every runtime
# reads; the others: their least normal value) and the largest.
SCALE_LIMITS = {
    "float16": (2.0**-24, 65504.0),
    "bfloat16": (2.0**-126, 3.3895313892515355e38),
    "float32": (2.0**-126, 3.4028234663852886e38),
}

# Shrinkage of the range tried by the scale search: 1 down to 0.35: 2-bit grids want ratios below
# one half, and as closed-form refits follow, finer steps than these gain nothing.
SEARCH_RATIOS = tuple(float(ratio) for ratio in np.linspace(1.0, 0.35, 14))


# The least scales that say enough: float16 has eight steps of its subnormals up to there.
LEAST_SCALES = {"float16": 8 * 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126}
# What scales below that are stored as is not greater; `round_scales` lifts the least to it.
TOO_SMALL = {**LEAST_SCALES, "float16": 7 * 2.0**-24}


class ScaleMisfit(InputError):
    """A scale, or an offset, is too large or too small for the dtype it is stored in.

    module: the layer, as soon as that is known
    """

    module = ""

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), {"module": self.module})


class ScaleOverflow(ScaleMisfit):
    """It is too large."""


def round_scales(scales: FloatArray, grid: Grid) -> FloatArray:
    """Scales as they are stored, in the dtype they came in.

    A scale too small for the stored dtype becomes its smallest positive value: the grid is then
    coarser than asked, and every result stays finite. Zero (an all-zero group) becomes 1.

    Raises:
        ScaleOverflow: a scale is too large for the stored dtype.
    """
    stored = SCALE_DTYPES[grid.scale_dtype]
    smallest, largest = SCALE_LIMITS[grid.scale_dtype]
    if not scales.size:
        return scales
    greatest = float(np.maximum.reduce(scales, axis=None))
    if not greatest <= largest:
        raise ScaleOverflow(
            f"a scale of {greatest:.4g} does not fit {grid.scale_dtype} (at most {largest:.4g})",
            hint="--scale-dtype float32",
        )
    rounded = np.maximum(scales, smallest).astype(stored).astype(scales.dtype)
    if np.minimum.reduce(scales, axis=None) == 0:
        rounded[scales == 0] = 1
    return rounded


def first_small_scale(rounded: QuantizedWeight) -> tuple[int, int] | None:
    """Row and group of the first scale that is too small for its dtype (what it decodes to are
    zeros, or hardly a bit), or None. Groups of nothing but zeros have a scale of 1."""
    small = rounded.scales.astype(np.float32) <= TOO_SMALL[rounded.grid.scale_dtype]
    if not small.any():
        return None
    row, group = np.argwhere(small)[0]
    return int(row), int(group)


def too_small(group: FloatArray, grid: Grid) -> str:
    """What is to be said of a group of weights whose scale is too small."""
    low, high = (float(end) for end in (group.min(initial=0), group.max(initial=0)))
    needed = max(-low, high) * 2 / grid.max_code if grid.sym else (high - low) / grid.max_code
    least = LEAST_SCALES[grid.scale_dtype]
    return f"a scale of {needed:.2g} is too small for {grid.scale_dtype} (at least {least:.2g})"


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


def fit_grid(
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


def zeros_along(zeros: FloatArray, grid: Grid, axis: int) -> FloatArray | int:
    """The zeros along the weight's axes; where all are the middle, that number."""
    return grid.mid_code if grid.sym and not grid.mirrored else np.expand_dims(zeros, axis)


def grid_by_zeros(rounded: QuantizedWeight) -> Grid:
    """The grid of a rounded weight as its zeros show it, for layouts that do not say all of it.

    All zeros in the middle: it is symmetric; and, of 16 groups or more, none mirrored, which is no
    chance any more. Some of them there, the others one less: symmetric and mirrored. (At 2 and 3
    bits those are the zeros that nearly all asymmetric groups have: there they show nothing.)
    """
    grid, zeros = rounded.grid, rounded.zeros
    middle = zeros == grid.mid_code
    if middle.all():
        return replace(grid, sym=True, mirrored=grid.mirrored and zeros.size < 16)
    mirrored = zeros == grid.mid_code - 1
    if not grid.sym and grid.bits > 3 and middle.any() and (middle | mirrored).all():
        return replace(grid, sym=True, mirrored=True)
    return grid


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


def round_to_nearest(
    weight: FloatArray, grid: Grid, importance: FloatArray | None = None
) -> QuantizedWeight:
    """Each weight rounded to the nearest point of its own group's grid.

    weight: float32 or float64 [out_features, in_features]
    importance: weights of a scale search, [in_features] or [out_features, in_features]; None for
        the plain range of each group
    """
    into = blank((weight.shape[0], weight.shape[1]), grid)
    if weight.size == 0:
        into.scales.fill(1)
        into.zeros.fill(grid.mid_code if grid.sym else 0)
        return into
    whole_tensor = grid.group_size == 0
    if whole_tensor:
        if importance is not None:
            importance = np.broadcast_to(importance, weight.shape).reshape(1, -1)
        scale, zero = fit_grid(weight.reshape(1, -1), grid, -1, importance)
        into.scales[:, 0], into.zeros[:, 0] = scale, zero

    def work(rows: slice) -> None:
        part = weight[rows]
        decoded = np.empty(part.shape, weight.dtype)
        if whole_tensor:
            _round_groups(part, scale, zeros_along(zero, grid, -1), grid, into.codes[rows], decoded)
            return
        own = importance if importance is None or importance.ndim == 1 else importance[rows]
        round_rows(part, into, rows, decoded, own)

    each(work, pieces(0, weight.shape[0], weight.shape[1]))
    return into


def blank(shape: tuple[int, int], grid: Grid) -> QuantizedWeight:
    """Room for a rounded weight of `shape`, to be filled a few rows at a time."""
    scales = np.empty(grid.scales_shape(shape), SCALE_DTYPES[grid.scale_dtype])
    zeros = np.empty(scales.shape, np.uint8)
    return QuantizedWeight(np.empty(shape, np.uint8), scales, zeros, grid)


def round_rows(
    weight: FloatArray,
    into: QuantizedWeight,
    rows: slice,
    decoded: FloatArray,
    importance: FloatArray | None = None,
) -> None:
    """Round a few rows of a weight, each group by itself, into those rows of `into`; `decoded`, of
    the shape of `weight`, receives what they decode to. (The group is not the whole tensor.)"""
    codes, scales, zeros, grid = into.codes[rows], into.scales[rows], into.zeros[rows], into.grid
    for columns, groups in grid.runs(weight.shape[1]):
        shape = (len(weight), groups.stop - groups.start, -1)
        part, weights = weight[:, columns].reshape(shape), importance
        if importance is not None:
            own = importance[..., columns]
            weights = own.reshape(*own.shape[:-1], *shape[1:])
        scale, zero = fit_grid(part, grid, -1, weights)
        scales[:, groups], zeros[:, groups] = scale, zero
        _round_groups(
            part,
            scale[..., None],
            zeros_along(zero, grid, -1),
            grid,
            codes[:, columns].reshape(shape),
            decoded[:, columns].reshape(shape),
        )


def _round_groups(
    weight: FloatArray,
    scale: FloatArray,
    zero: FloatArray | int,
    grid: Grid,
    codes: Codes,
    decoded: FloatArray,
) -> None:
    """Codes and what they decode to of weights whose scales and zeros are known."""
    if grid.mirrored:  # the scale changes its sign instead: numbers are the faster limits
        mirrored, zero = zero != grid.mid_code, grid.mid_code
        scale = np.where(mirrored, -scale, scale)
    centred = np.divide(weight, scale, out=decoded)
    round_centred(centred, grid.min_code - zero, grid.max_code - zero, out=centred)
    np.add(centred, zero, out=codes, casting="unsafe")
    if grid.mirrored:  # and codes count from the other end: max_code − code
        np.bitwise_xor(codes, np.where(mirrored, grid.max_code, 0).astype(np.uint8), out=codes)
    with np.errstate(over="ignore"):  # the ends of the widest range decode to infinity
        centred *= scale
