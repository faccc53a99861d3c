"""Weights rounded to small floats by the definition: nearest level, ties to the even code; scales
from the greatest weight that shares them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import Array
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.registry import format_named

SCALES = {
    "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32,
    "e8m0": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
_WITH_INPUTS = {"FP8A16": "FP8_DYNAMIC"}  # its weights alone have no scheme


def scheme(name: str) -> tuple[Grid, Activation | None]:
    """The grid and the inputs of a scheme, scales in bfloat16 where it does not say."""
    base = SCHEMES[_WITH_INPUTS.get(name, name)]
    keys = ("bits", "group_size", "sym", "narrow_range")
    own = {key: value for key, value in base.settings.items() if key in keys}
    grid = Grid(**{"scale_dtype": "bfloat16", **own, **base.grid})
    return grid, None if name.endswith("A16") else base.inputs


NAMES = (*(name for name, own in SCHEMES.items() if own.fixed), "FP8A16", "W4AFP8")
GRIDS = {name: scheme(name) for name in NAMES}


def float_layer(
    scheme: str,
    shape: tuple[int, int] = (24, 256),
    scale_dtype: str | None = None,
    module: str = "model.layers.0.mlp.down_proj",
    dtype: str = "BF16",
) -> Layer:
    grid, activation = GRIDS[scheme]
    if scale_dtype is not None:
        grid = replace(grid, scale_dtype=scale_dtype)
    tensor = f"{module}.weight"
    return Layer(module, tensor, shape, shape, dtype, grid, activation=activation)


def nearest_codes(steps: Array, grid: Grid) -> Array:
    """Of weights divided by their scales, one row after the other."""
    table = grid.small_float
    assert table is not None
    values = table.values[: 2 ** (grid.bits - 1)].astype(np.float64)
    values = values[np.isfinite(values)]
    result = np.empty(steps.shape, np.uint8)
    for row, own in zip(result, steps, strict=True):
        far = np.abs(np.abs(own)[:, None] - values)
        least = far.min(1, keepdims=True)
        even = (far == least) & (np.arange(len(values)) % 2 == 0)
        first = np.where(even.any(1), even.argmax(1), far.argmin(1))
        row[:] = first + np.where(np.signbit(own), 2 ** (grid.bits - 1), 0)
    return result


def rounded_float(
    own: Layer, weight: Array, global_scale: float | None = None, input_scale: float | None = 0.25
) -> QuantizedWeight:
    """`weight` [out_features, in_features], rounded to the layer's grid.

    global_scale: of NVFP4, else as the greatest weight wants it
    """
    grid, (rows, columns) = own.grid, own.shape
    table = grid.small_float
    assert table is not None
    shape, width = grid.scales_shape(own.shape), grid.width(columns)
    down = rows if grid.group_size == 0 else grid.block_rows
    largest = np.array([
        [np.abs(weight[r * down : r * down + down, g * width : g * width + width]).max(initial=0)
         for g in range(shape[1])] for r in range(shape[0])
    ], np.float64)  # fmt: skip
    scales = np.where(largest > 0, largest / table.largest, 1.0)
    if grid.scale_dtype == "e8m0":
        scales = np.exp2(np.ceil(np.log2(scales)))
    if grid.scale_dtype == "e4m3":
        whole = 448 * 6 / largest.max() if global_scale is None else global_scale
        grid = replace(grid, global_scale=float(np.float32(whole)))
        scales *= grid.global_scale
    stored = scales.astype(np.float32).astype(SCALES[grid.scale_dtype])
    divisors = stored.astype(np.float64) / grid.global_scale
    whole = np.repeat(np.repeat(divisors, down, 0), width, 1)[:rows, :columns]
    static = own.activation is not None and (
        not own.activation.dynamic or own.activation.scale_dtype == "e4m3"
    )
    return QuantizedWeight(
        codes=nearest_codes(
            np.divide(weight, whole, out=np.zeros(own.shape), where=whole > 0), grid
        ),
        scales=stored,
        zeros=np.zeros(shape, np.uint8),
        grid=grid,
        input_scale=input_scale if static else None,
    )


def own_layer(fmt: str, scheme: str, shape: tuple[int, int] = (24, 256), **more: Any) -> Layer:
    """A layer of a scheme, with the scales that the format wants."""
    own = float_layer(scheme, shape, **more)
    if own.grid.scale_dtype == "bfloat16" and fmt == "fp8":
        own = replace(own, grid=replace(own.grid, scale_dtype="float32"))
    return own


def any_codes(own: Layer, seed: int = 0) -> QuantizedWeight:
    """Every code that means something, and any scales."""
    rng, grid = np.random.default_rng(seed), own.grid
    table = grid.small_float
    assert table is not None
    codes = np.flatnonzero(np.isfinite(table.values)).astype(np.uint8)
    shape = grid.scales_shape(own.shape)
    scales = np.exp2(rng.integers(-8, 8, shape)).astype(SCALES[grid.scale_dtype])
    if grid.scale_dtype == "e4m3":
        scales[0, 0] = 0
    calibrated = own.activation is not None and own.activation.calibrated
    return QuantizedWeight(
        codes=rng.permutation(np.resize(codes, own.size)).reshape(own.shape),
        scales=scales,
        zeros=np.zeros(shape, np.uint8),
        grid=replace(grid, global_scale=512.5) if grid.scale_dtype == "e4m3" else grid,
        input_scale=0.25 if calibrated else None,
    )


def written(fmt: str, layers: list[Layer]) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a model folder in this format has: config.json and tensors."""
    record, tensors = format_named(fmt), {}
    for own in layers:
        weight = any_codes(own)
        if not record.global_scale:
            weight = replace(weight, grid=own.grid)
        tensors |= record.encode(own, weight)
    config: dict[str, Any] = {"dtype": "bfloat16"}
    config |= dict.fromkeys(record.config_keys, record.config(layers, ["lm_head"]))
    return config, tensors
