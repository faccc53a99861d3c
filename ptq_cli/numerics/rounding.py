"""Scales, zeros and rounding: `weight ≈ scales · (codes − zeros)`.

Every function works on any layout: `axis` is the axis along which the columns of one group lie, and
scales and zeros come back without it. Arithmetic stays in the dtype of the weight (float32 or
float64); scales are rounded to the dtype they are stored in before a code is chosen, so what a
runtime decodes is what was optimised.

Inside the engine codes are *centred*, `codes − zeros`: the dequantized weight is one product.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Array, Codes, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.numerics.buffers import kept
from ptq_cli.numerics.parallel import each

PIECE_ELEMENTS = 1 << 17  # weights rounded at a time
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


class ScaleOverflow(InputError):
    """A scale is too large for the dtype it is stored in."""


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


def range_grid(low: FloatArray, high: FloatArray, grid: Grid) -> tuple[FloatArray, FloatArray]:
    """Scales and zeros that cover [low, high] (each group's least and greatest weight).

    Symmetric: `scale = absmax / ((2^bits − 1)/2)`, or with narrow range
    `absmax / (2^(bits−1) − 1)`; `zero = 2^(bits−1)`. Asymmetric: the range is widened to hold 0,
    `scale = (high − low)/(2^bits − 1)`, `zero = round(−low/scale)` kept inside the codes.
    """
    if grid.sym:
        steps = (grid.max_code - 1) / 2 if grid.narrow_range else grid.max_code / 2
        scales = round_scales(np.maximum(-low, high) / low.dtype.type(steps), grid)
        zeros = np.empty_like(scales)
        zeros.fill(grid.mid_code)
        return scales, zeros
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    n_steps = low.dtype.type(grid.max_code)
    # Two quotients, so that high − low cannot overflow.
    scales = round_scales(high / n_steps - low / n_steps, grid)
    return scales, np.clip(np.rint(-low / scales), 0, grid.max_code)


def fit_grid(weight: FloatArray, grid: Grid, axis: int) -> tuple[FloatArray, FloatArray]:
    """Scales and zeros of the whole range of each group, without a search."""
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
    """Scales and zeros of the shrunken range with the least weighted squared rounding error.

    weight: columns of each group along `axis`
    importance: weight of each column's squared error, broadcastable to `weight`
    """
    low, high = weight.min(axis), weight.max(axis)
    scales, zeros = range_grid(low, high, grid)
    least = _rounding_error(weight, importance, scales, zeros, grid, axis)
    for ratio in SEARCH_RATIOS[1:]:
        shrink = weight.dtype.type(ratio)
        new_scales, new_zeros = range_grid(low * shrink, high * shrink, grid)
        error = _rounding_error(weight, importance, new_scales, new_zeros, grid, axis)
        better = error < least
        least = np.where(better, error, least)
        scales = np.where(better, new_scales, scales)
        zeros = np.where(better, new_zeros, zeros)
    return scales, zeros


def _rounding_error(
    weight: FloatArray,
    importance: FloatArray,
    scales: FloatArray,
    zeros: FloatArray,
    grid: Grid,
    axis: int,
) -> FloatArray:
    """`Σ importance · (weight − dequantized)²` per group, in units of nothing but the weight's."""
    scale = np.expand_dims(scales, axis)
    steps = weight / scale
    error = round_centred(steps, np.expand_dims(zeros, axis), grid)
    error -= steps
    error *= error
    error *= importance
    total: FloatArray = error.sum(axis)
    return total * scales * scales


def round_centred(steps: FloatArray, zeros: FloatArray, grid: Grid) -> FloatArray:
    """Centred codes nearest to `steps = weight / scale`, within the codes there are."""
    centred = np.rint(steps)
    np.maximum(centred, grid.min_code - zeros, out=centred)
    np.minimum(centred, grid.max_code - zeros, out=centred)
    return centred


def round_to_nearest(
    weight: FloatArray, grid: Grid, importance: FloatArray | None = None
) -> QuantizedWeight:
    """Each weight rounded to the nearest point of its own group's grid.

    weight: float32 or float64 [out_features, in_features]
    importance: weights of a scale search, [in_features] or [out_features, in_features]; None for
        the plain range of each group
    """
    out_features, in_features = weight.shape
    codes = np.empty(weight.shape, np.uint8)
    scales = np.ones(grid.scales_shape((out_features, in_features)), weight.dtype)
    zeros = np.zeros(scales.shape, weight.dtype)
    if weight.size == 0:
        zeros += grid.mid_code if grid.sym else 0
        return pack_result(codes, scales, zeros, grid)
    if grid.group_size == 0:
        flat = weight.reshape(1, -1)
        spread = importance
        if importance is not None:
            spread = np.broadcast_to(importance, weight.shape).reshape(1, -1)
        fitted = _fit(flat, spread, grid)
        scales[:], zeros[:] = fitted[0].reshape(1, 1), fitted[1].reshape(1, 1)
        steps = weight / scales
        codes[:] = round_centred(steps, zeros, grid) + zeros
        return pack_result(codes, scales, zeros, grid)

    def work(rows: slice) -> None:
        own = importance if importance is None or importance.ndim == 1 else importance[rows]
        round_rows(weight[rows], grid, own, codes[rows], scales[rows], zeros[rows])

    each(work, pieces(0, out_features, in_features))
    return pack_result(codes, scales, zeros, grid)


def blank(shape: tuple[int, int], grid: Grid, codes: Codes | None = None) -> QuantizedWeight:
    """Room for a rounded weight of `shape`, to be filled a few rows at a time; `codes` is the room
    for its codes where there is some."""
    scales = np.empty(grid.scales_shape(shape), SCALE_DTYPES[grid.scale_dtype])
    codes = np.empty(shape, np.uint8) if codes is None else codes
    return QuantizedWeight(codes, scales, np.empty(scales.shape, np.uint8), grid)


def round_piece(weight: FloatArray, into: QuantizedWeight, rows: slice) -> FloatArray:
    """`round_to_nearest` of a few rows, written into those rows of `into`; gives their error,
    `weight − dequantized`, in memory of the next call. (The group is not the whole tensor.)"""
    error: FloatArray = kept("decoded", weight.shape, weight.dtype)
    codes, scales, zeros = into.codes[rows], into.scales[rows], into.zeros[rows]
    round_rows(weight, into.grid, None, codes, scales, zeros, error)
    np.subtract(weight, error, out=error)
    return error


def pieces(start: int, stop: int, columns: int, elements: int = PIECE_ELEMENTS) -> list[slice]:
    """Rows start … stop−1, a few at a time: what is done with them stays in the cache."""
    step = max(1, elements // max(1, columns))
    return [slice(top, min(stop, top + step)) for top in range(start, stop, step)]


def round_rows(
    weight: FloatArray,
    grid: Grid,
    importance: FloatArray | None,
    codes: Codes,
    scales: Array,
    zeros: Array,
    decoded: FloatArray | None = None,
) -> None:
    """Round some rows; the results go into `codes`, `scales` and `zeros` of these rows, and what
    they decode to into `decoded`."""
    work = kept("decoded", weight.shape, weight.dtype) if decoded is None else decoded
    for columns, groups in grid.runs(weight.shape[1]):
        shape = (len(weight), groups.stop - groups.start, -1)
        part, centred = weight[:, columns].reshape(shape), work[:, columns].reshape(shape)
        found, weights = codes[:, columns].reshape(shape), importance
        if importance is not None:
            own = importance[..., columns]
            weights = own.reshape(*own.shape[:-1], *shape[1:])
        scales[:, groups], zeros[:, groups] = part_scales, part_zeros = _fit(part, weights, grid)
        scale = part_scales[..., None]
        np.divide(part, scale, out=centred)
        np.rint(centred, out=centred)
        if grid.sym:
            middle = grid.mid_code
            centred.clip(grid.min_code - middle, grid.max_code - middle, out=centred)
            found.view(np.int8)[...] = centred
            found += np.uint8(middle)
        else:
            zero = part_zeros[..., None]
            centred += zero
            centred.clip(grid.min_code, grid.max_code, out=centred)
            found[...] = centred
            if decoded is not None:
                centred -= zero
        if decoded is not None:
            centred *= scale


def _fit(
    weight: FloatArray, importance: FloatArray | None, grid: Grid
) -> tuple[FloatArray, FloatArray]:
    if importance is None:
        return fit_grid(weight, grid, -1)
    return search_grid(weight, importance, grid, -1)


def pack_result(
    codes: NDArray[Any],
    scales: FloatArray,
    zeros: FloatArray,
    grid: Grid,
    g_idx: NDArray[np.int32] | None = None,
) -> QuantizedWeight:
    """The engine's arrays in the dtypes a `QuantizedWeight` promises."""
    return QuantizedWeight(
        codes=np.ascontiguousarray(codes, np.uint8),
        scales=scales.astype(SCALE_DTYPES[grid.scale_dtype]),
        zeros=zeros.astype(np.uint8),
        grid=grid,
        g_idx=g_idx,
    )
