"""Rounding of whole weights, each to the nearest point of its group's grid: `weight ≈ scales ·
level`.

Arithmetic stays in the dtype of the weight (float32 or float64); scales are rounded to the dtype
they are stored in before a code is chosen, so what a runtime decodes is what was optimised.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ptq_cli.core.grid import SUPER_BLOCK, Grid
from ptq_cli.core.tensors import FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.numerics import super_blocks
from ptq_cli.numerics.numbers import numbers_of
from ptq_cli.numerics.parallel import each, pieces, strips
from ptq_cli.numerics.scales import SCALE_DTYPES, stored_scales


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
        into.zeros.fill(grid.mid_code if grid.sym and grid.integers else 0)
        return into
    numbers = numbers_of(grid)
    whole_tensor = grid.group_size == 0
    if whole_tensor:
        if importance is not None:
            importance = np.broadcast_to(importance, weight.shape).reshape(1, -1)
        scale, zero, _ = numbers.fit(weight.reshape(1, -1), grid, -1, importance)
        into.scales[:, 0], into.zeros[:, 0] = stored_scales(scale, grid), zero

    def work(rows: slice) -> None:
        part = weight[rows]
        decoded = np.empty(part.shape, weight.dtype)
        if whole_tensor:
            numbers.round_groups(part, scale, zero, grid, into.codes[rows], decoded)
            return
        own = importance if importance is None or importance.ndim == 1 else importance[rows]
        if grid.block_rows == 1:
            round_rows(part, into, rows, decoded, own)
        else:
            _round_block(part, into, rows, decoded, own)

    if grid.block_rows == 1:
        each(work, pieces(0, weight.shape[0], weight.shape[1]))
    else:
        each(work, strips(weight.shape[0], grid.block_rows))
    return into


def blank(shape: tuple[int, int], grid: Grid) -> QuantizedWeight:
    """Room for a rounded weight of `shape`, to be filled a few rows at a time."""
    scales = np.empty(grid.scales_shape(shape), SCALE_DTYPES[grid.scale_dtype])
    zeros = np.empty(scales.shape, np.uint8)
    own: dict[str, Any] = {"offsets": np.empty_like(scales)} if grid.own_offsets else {}
    if grid.multiples:
        of_blocks = (shape[0], shape[1] // SUPER_BLOCK)
        own["super_scales"] = np.empty(of_blocks, np.float16)
        own |= {"super_offsets": np.empty(of_blocks, np.float16)} if grid.own_offsets else {}
    return QuantizedWeight(np.empty(shape, np.uint8), scales, zeros, grid, **own)


def round_rows(
    weight: FloatArray,
    into: QuantizedWeight,
    rows: slice,
    decoded: FloatArray,
    importance: FloatArray | None = None,
) -> None:
    """Round a few rows of a weight, each group by itself, into those rows of `into`; `decoded`, of
    the shape of `weight`, receives what they decode to. (`Grid.by_rows`.)"""
    if into.grid.multiples:
        super_blocks.round_rows(weight, into.panel(rows), decoded, importance)
        return
    codes, scales, zeros, grid = into.codes[rows], into.scales[rows], into.zeros[rows], into.grid
    numbers = numbers_of(grid)
    for columns, groups in grid.runs(weight.shape[1]):
        shape = (len(weight), groups.stop - groups.start, -1)
        part, weights = weight[:, columns].reshape(shape), importance
        if importance is not None:
            own = importance[..., columns]
            weights = own.reshape(*own.shape[:-1], *shape[1:])
        scale, zero, offset = numbers.fit(part, grid, -1, weights)
        scales[:, groups], zeros[:, groups] = stored_scales(scale, grid), zero
        own = decoded[:, columns].reshape(shape)
        numbers.round_groups(
            part if offset is None else part - offset[..., None],
            scale[..., None],
            zero[..., None],
            grid,
            codes[:, columns].reshape(shape),
            own,
        )
        if offset is not None and into.offsets is not None:
            into.offsets[rows, groups] = offset
            own += offset[..., None]


def _round_block(
    weight: FloatArray,
    into: QuantizedWeight,
    rows: slice,
    decoded: FloatArray,
    importance: FloatArray | None = None,
) -> None:
    """`round_rows` of one block of rows that share their scales."""
    grid, block = into.grid, rows.start // into.grid.block_rows
    numbers, codes = numbers_of(grid), into.codes[rows]
    for columns, groups in grid.runs(weight.shape[1]):
        shape = (len(weight), groups.stop - groups.start, -1)
        part, weights = weight[:, columns].reshape(shape), importance
        if importance is not None:
            own = np.broadcast_to(importance[..., columns], (len(weight), part[0].size))
            weights = _side_by_side(own.reshape(shape))
        scale, zero, _ = numbers.fit(_side_by_side(part), grid, -1, weights)
        into.scales[block, groups], into.zeros[block, groups] = stored_scales(scale, grid), zero
        numbers.round_groups(
            part,
            scale[:, None],
            zero[:, None],
            grid,
            codes[:, columns].reshape(shape),
            decoded[:, columns].reshape(shape),
        )


def _side_by_side(rows: FloatArray) -> FloatArray:
    """[rows, groups, columns] as [groups, rows · columns]."""
    return np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(rows.shape[1], -1)


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
