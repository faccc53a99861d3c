"""A quantized weight in the tensors of another layout, without loss or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.core.tensors import Array
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.numerics.scales import SCALE_DTYPES
from ptq_cli.run.nearest import same_weight


def convert(
    weight: QuantizedWeight, target: Layer, fmt: Format
) -> tuple[dict[str, Array], QuantizedWeight]:
    """The target's tensors of a weight, and what they unpack to. Raises InputError where they would
    not say the same."""
    moved = _regrouped(weight, target.grid)
    if target.activation is None:  # another scheme may leave inputs as they are
        moved = replace(moved, input_scale=None, input_zero=None)
    tensors = fmt.encode(target, moved)
    back = fmt.decode(target, tensors)
    inputs = (back.input_scale, back.input_zero) == (moved.input_scale, moved.input_zero)
    if not (same_weight(back, moved) and inputs):
        raise InputError(f"{fmt.name} would not give back the same values")
    if back.offsets is not None and moved.offsets is None:
        raise InputError(
            f"{fmt.name} would round −zero · scale to {back.offsets.dtype}",
            hint="--scale-dtype float32 where the format has it, or quantize the float model",
        )
    return tensors, back


def _regrouped(weight: QuantizedWeight, grid: Grid) -> QuantizedWeight:
    """The weight on a grid of other groups and another dtype of scales, if that loses nothing."""
    scales, before = weight.scales, weight.grid
    if grid.multiples or before.multiples:
        if (grid.scale_dtype, grid.group_size) != (before.scale_dtype, before.group_size):
            raise InputError(
                "its scales are multiples of super-blocks', and stay in groups of"
                f" {before.group_size}",
                hint="leave --group-size and --scale-dtype out",
            )
        return replace(weight, grid=grid)
    if grid.scale_dtype == before.scale_dtype:
        grid = replace(grid, global_scale=before.global_scale)
    elif "e4m3" in (grid.scale_dtype, before.scale_dtype):
        scales = weight.float_scales().astype(np.float32) * np.float32(grid.global_scale)
    scales = _cast(scales, SCALE_DTYPES[grid.scale_dtype])
    if grid.own_offsets and not before.own_offsets:  # whatever zeros were nearest to them
        weight = replace(weight, zeros=np.zeros_like(weight.zeros))
    if grid.group_size == weight.grid.group_size:
        return replace(weight, scales=scales, grid=grid)
    if weight.g_idx is not None:
        raise InputError(
            "columns were reordered (act_order desc), so groups cannot change",
            hint="leave --group-size out",
        )
    columns = weight.codes.shape[1]
    group, starts = grid.g_idx(columns), grid.starts(columns)[:-1]

    def of_groups(values: Array) -> Array:
        wide = np.broadcast_to(values, (len(weight.codes), values.shape[1]))
        wide = wide[:, weight.column_groups()]
        own = np.ascontiguousarray(wide[:1, :1] if grid.group_size == 0 else wide[:, starts])
        full = np.broadcast_to(own, (len(wide), own.shape[1]))[:, group]
        if not np.array_equal(full, wide):
            raise InputError(
                f"its groups of {weight.grid.group_size} columns do not fit into groups of"
                f" {grid.group_size}",
                hint=f"--group-size {grid.group_size} when the float model is quantized",
            )
        return own

    return replace(
        weight,
        scales=of_groups(scales),
        zeros=of_groups(weight.zeros),
        offsets=None if weight.offsets is None else of_groups(weight.offsets),
        grid=grid,
    )


def _cast(scales: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        result: Array = scales.astype(dtype)
    if (result.astype(np.float64) != scales.astype(np.float64)).any():
        small = dtype.itemsize == 1
        raise InputError(
            f"its scales are {scales.dtype}, some of which {dtype} cannot hold exactly",
            hint="round it anew: ptq rtn --scheme"
            if small
            else f"--scale-dtype {dtype} when the float model is quantized",
        )
    return result
