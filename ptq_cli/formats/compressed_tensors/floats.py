"""`float-quantized`, `naive-quantized`, `mxfp8-quantized` (FP8), `nvfp4-pack-quantized` and
`mxfp4-pack-quantized` (FP4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.formats import common, small_floats
from ptq_cli.formats.compressed_tensors.inputs import (
    encode_inputs,
    input_scale,
    input_specs,
    scales_shape,
)
from ptq_cli.formats.compressed_tensors.layouts import MXFP4, MXFP8, NVFP4, layout
from ptq_cli.formats.small_floats import E4M3, FP8_GROUPS, FP8_TENSOR, FP8_TOKENS
from ptq_cli.numerics.packing import pack, unpack

LIMITS = common.Limits(
    bits=(4, 8),
    scale_dtypes=(*common.SCALE_WORDS, "e8m0", "e4m3"),
    activations=True,
    levels=("e2m1", "e4m3"),
)
_WIDTHS = {("e2m1", "e4m3"): 16, ("e2m1", "e8m0"): 32, ("e4m3", "e8m0"): 32}
_INPUTS = {
    NVFP4: Activation(4, levels="e2m1", group_size=16, scale_dtype="e4m3"),
    MXFP4: Activation(4, levels="e2m1", group_size=32, scale_dtype="e8m0"),
    MXFP8: Activation(8, levels="e4m3", group_size=32, scale_dtype="e8m0"),
}


def misfit(layer: Layer, name: str) -> Misfit | None:
    if found := common.misfit(layer, name, LIMITS):
        return found
    if found := small_floats.grid_misfit(layer, name, _WIDTHS):
        return found
    own = layout(layer.grid, layer.activation)
    held = (FP8_GROUPS,) if small_floats.is_block(layer.grid) else (FP8_TOKENS, FP8_TENSOR)
    if small_floats.same_inputs(layer.activation, None, *held) and own not in _INPUTS:
        return None
    if small_floats.same_inputs(layer.activation, None, _INPUTS.get(own)):
        return None
    return Misfit(f"{name} rounds inputs of {own} as the weights, or not at all", "--scheme FP8")


def specs(layer: Layer) -> list[TensorSpec]:
    (rows, columns), module = layer.shape, layer.module
    shape, own = scales_shape(layer), layout(layer.grid, layer.activation)
    if layer.grid.bits == 4:
        found = [TensorSpec(f"{module}.weight_packed", "U8", (rows, columns // 2))]
    else:
        found = [TensorSpec(f"{module}.weight", "F8_E4M3", layer.shape)]
    word = {NVFP4: "F8_E4M3", MXFP4: "U8", MXFP8: "U8"}.get(own)
    word = common.SCALE_WORDS[layer.grid.scale_dtype] if word is None else word
    found.append(TensorSpec(f"{module}.weight_scale", word, shape))
    if own == NVFP4:
        found.append(TensorSpec(f"{module}.weight_global_scale", "F32", (1,)))
    return found + input_specs(layer)


def encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    grid, scales = rounded.grid, rounded.scales.reshape(scales_shape(layer))
    tensors: dict[str, Array] = {"weight_scale": scales}
    if grid.scale_dtype == "e8m0":
        tensors["weight_scale"] = scales.view(np.uint8)
    elif grid.scale_dtype == "e4m3":
        name = f"{layer.module}.weight_global_scale"
        tensors["weight_global_scale"] = small_floats.one_number(name, grid.global_scale)
    if grid.bits == 4:
        tensors["weight_packed"] = pack(rounded.codes, 4)
    else:
        tensors["weight"] = rounded.codes.view(E4M3)
    return tensors | encode_inputs(layer, rounded)


def decode(layer: Layer, own: Mapping[str, Array]) -> QuantizedWeight:
    grid, module = layer.grid, layer.module
    name, scales = f"{module}.weight_scale", own["weight_scale"]
    if grid.scale_dtype == "e8m0":
        scales = small_floats.e8m0_scales(name, scales)
    elif grid.scale_dtype == "e4m3":
        scales = small_floats.e4m3_scales(name, scales)
        divisor = f"{module}.weight_global_scale"
        factor = small_floats.positive(divisor, own["weight_global_scale"])
        grid = replace(grid, global_scale=factor)
    if grid.bits == 4:
        codes = unpack(own["weight_packed"], 4, layer.shape[1])
    else:
        codes = small_floats.fp8_codes(f"{module}.weight", own["weight"])
    return QuantizedWeight(
        codes=codes,
        scales=scales.reshape(grid.scales_shape(layer.shape)),
        zeros=small_floats.no_zeros(layer),
        grid=grid,
        input_scale=input_scale(layer, own),
    )
