"""Scales as they are stored: rounded to a float of 16 or 32 bits, to a power of two, or to an E4M3
under one scale of the tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from ptq_cli.core.grid import SUPER_BLOCK, Grid
from ptq_cli.core.levels import SmallFloat
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError

SCALE_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "uint4": np.dtype(np.uint8),
    "uint6": np.dtype(np.uint8),
    "int6": np.dtype(np.int8),
    "int8": np.dtype(np.int8),
}

# Smallest positive value a stored scale may take (float16: its subnormals, which every runtime
# reads; E4M3: the same; the others: their least normal value) and the largest.
SCALE_LIMITS = {
    "float16": (2.0**-24, 65504.0),
    "bfloat16": (2.0**-126, 3.3895313892515355e38),
    "float32": (2.0**-126, 3.4028234663852886e38),
    "e8m0": (2.0**-126, 2.0**127),
    "e4m3": (2.0**-9, 448.0),
}

# The least scales that say enough: float16 has eight steps of its subnormals up to there. Of E4M3
# any does: what is that much smaller than the rest of the tensor may be zero.
LEAST_SCALES = {
    "float16": 8 * 2.0**-24,
    "bfloat16": 2.0**-126,
    "float32": 2.0**-126,
    "e8m0": 2.0**-126,
    "e4m3": 0.0,
}
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
    coarser than asked, and every result stays finite. Zero (an all-zero group) becomes 1. Powers of
    two: the nearest. E4M3: what is greater than the largest becomes the largest.

    Raises:
        ScaleOverflow: a scale is too large for the stored dtype.
    """
    if not scales.size:
        return scales
    smallest, largest = SCALE_LIMITS[grid.scale_dtype]
    greatest = float(np.maximum.reduce(scales, axis=None))
    if grid.scale_dtype == "e4m3" and np.isfinite(greatest):
        stored = stored_scales(scales, grid).astype(np.float32)
        return (stored / np.float32(grid.global_scale)).astype(scales.dtype)
    if not greatest <= largest:
        raise ScaleOverflow(
            f"a scale of {greatest:.4g} does not fit {grid.scale_dtype} (at most {largest:.4g})",
            hint="--scale-dtype float32",
        )
    rounded = np.maximum(scales, smallest).astype(SCALE_DTYPES[grid.scale_dtype])
    result = rounded.astype(scales.dtype)
    if np.minimum.reduce(scales, axis=None) == 0:
        result[scales == 0] = 1
    return result


def round_offsets(offsets: FloatArray, grid: Grid) -> FloatArray:
    """Offsets as they are stored, beside scales of 16 or 32 bits, in the dtype they came in.

    Raises:
        ScaleOverflow: one is too large.
    """
    largest, greatest = SCALE_LIMITS[grid.scale_dtype][1], float(np.abs(offsets).max(initial=0))
    if not greatest <= largest:
        raise ScaleOverflow(
            f"an offset of {greatest:.4g} does not fit {grid.scale_dtype} (at most {largest:.4g})",
            hint="--scale-dtype float32",
        )
    return offsets.astype(SCALE_DTYPES[grid.scale_dtype]).astype(offsets.dtype)


def global_scale_of(absmax: float, small: SmallFloat, power_of_two: bool = False) -> float:
    """What E4M3 scales of a tensor are divided by, a float32: its greatest weight by size is then
    the largest scale times the largest level. 1 where all are zero (or not finite).

    power_of_two: the next one below
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found = np.float32(SCALE_LIMITS["e4m3"][1] * small.largest) / np.float32(absmax)
    if not np.isfinite(found) or found <= 0:
        return 1.0
    return float(2.0 ** np.floor(np.log2(found))) if power_of_two else float(found)


def check_lone_scale(greatest: float) -> None:
    """Refuse a tensor whose greatest scale E4M3 cannot hold without a global one, or hardly: below
    2^-7, of steps of 2^-9. Zeros fit.

    Raises:
        ScaleMisfit: it does not fit.
    """
    if greatest == 0 or 2.0**-7 <= greatest <= SCALE_LIMITS["e4m3"][1]:
        return
    raise ScaleMisfit(
        f"a scale of {greatest:.2g} does not fit E4M3 without a global scale (2^-7 to 448)",
        hint="--scheme MXFP4A16",
    )


def stored_scales(scales: FloatArray, grid: Grid) -> Array:
    """Scales in the dtype they are stored in: that of E4M3 holds them times the global scale."""
    if grid.scale_dtype == "e4m3":
        smallest, largest = SCALE_LIMITS["e4m3"]
        scales = np.clip(scales * scales.dtype.type(grid.global_scale), smallest, largest)
    return scales.astype(SCALE_DTYPES[grid.scale_dtype])


def first_small_scale(rounded: QuantizedWeight) -> tuple[int, int] | None:
    """Row and group of the first scale that is too small for its dtype (what it decodes to are
    zeros, or hardly a bit), or None. Groups of nothing but zeros have a scale of 1."""
    scales, dtype = rounded.scales, rounded.grid.scale_dtype
    if rounded.super_scales is None:
        own = np.abs(scales.astype(np.float32))
        small = (own <= TOO_SMALL[dtype]) & (own != 0)  # 0: a group of zeros on a table without 0
    else:  # of those whose groups are not all zeros
        least = np.repeat(np.abs(rounded.super_scales), _groups_of_block(rounded), axis=1)
        small = (least <= TOO_SMALL["float16"]) & (scales != 0)
    if not small.any():
        return None
    row, group = np.argwhere(small)[0]
    return int(row), int(group)


def _groups_of_block(rounded: QuantizedWeight) -> int:
    return SUPER_BLOCK // rounded.grid.group_size


def too_small(group: FloatArray, grid: Grid) -> str:
    """What is to be said of a group of weights whose scale is too small."""
    low, high = (float(end) for end in (group.min(initial=0), group.max(initial=0)))
    dtype = grid.scale_dtype
    if grid.multiples is not None:
        largest = max(map(abs, grid.multiples))
        single = replace(grid, scale_dtype="float16")
        return f"under a super-block's float16, {too_small(group / largest, single)}"
    if grid.table is not None:
        needed = max(-low, high) / float(np.nanmax(np.abs(grid.table)))
    elif grid.sym:
        needed = max(-low, high) * 2 / grid.max_code
    else:
        needed = (high - low) / grid.max_code
    least = LEAST_SCALES[dtype]
    return f"a scale of {needed:.2g} is too small for {dtype} (at least {least:.2g})"
