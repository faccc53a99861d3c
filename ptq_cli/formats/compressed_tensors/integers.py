"""`pack-quantized` and `int-quantized`: integers of 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.tensors import Array, Codes, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.formats.compressed_tensors.inputs import (
    encode_inputs,
    input_scale,
    input_specs,
    scales_shape,
)
from ptq_cli.formats.compressed_tensors.layouts import PLAIN, layout
from ptq_cli.formats.small_floats import FP8_TOKENS, same_inputs
from ptq_cli.numerics.packing import pack_words, unpack_words, words_width

LIMITS = common.Limits(
    bits=(2, 3, 4, 5, 6, 7, 8), scale_dtypes=tuple(common.SCALE_WORDS), activations=True
)


def is_plain(layer: Layer) -> bool:
    """Whether codes are stored as plain int8."""
    return layout(layer.grid, layer.activation) == PLAIN


def misfit(layer: Layer, name: str) -> Misfit | None:
    grid, activation, plain = layer.grid, layer.activation, is_plain(layer)
    if found := common.misfit(layer, name, replace(LIMITS, whole_tensor=plain)):
        return found
    if activation is None:
        return None
    if activation.levels != "integer":
        if grid.bits != 4 or not grid.sym or not same_inputs(activation, FP8_TOKENS):
            reason = f"{name} rounds inputs to FP8, by token, beside symmetric integers of 4 bits"
            return Misfit(reason, "--scheme W4AFP8")
        return None
    if activation.dynamic and not activation.per_token:
        hint = "--activation-scheme dynamic-token"
        return Misfit(f"{name} has no dynamic scale per tensor", hint)
    if activation.bits != 8:
        reason = f"{name} rounds inputs to 8 bits here, not {activation.bits}"
        return Misfit(reason, "--scheme W8A8")
    if plain and grid.group_size > 0:
        reason = f"{name} W8A8 has no groups of {grid.group_size} columns"
        return Misfit(reason, "--group-size -1")
    return None


def specs(layer: Layer) -> list[TensorSpec]:
    (rows, columns), grid, module = layer.shape, layer.grid, layer.module
    shape = scales_shape(layer)
    found = [TensorSpec(f"{module}.weight_scale", common.SCALE_WORDS[grid.scale_dtype], shape)]
    if is_plain(layer):
        found.append(TensorSpec(f"{module}.weight", "I8", layer.shape))
        zero_point = TensorSpec(f"{module}.weight_zero_point", "I8", shape)
    else:
        packed = (rows, words_width(columns, grid.bits))
        found.append(TensorSpec(f"{module}.weight_packed", "I32", packed))
        found.append(TensorSpec(f"{module}.weight_shape", "I64", (2,)))
        zeros = (words_width(rows, grid.bits), shape[-1])
        zero_point = TensorSpec(f"{module}.weight_zero_point", "I32", zeros)
    if not grid.sym:
        found.append(zero_point)
    return found + input_specs(layer)


def encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    bits, shape = layer.grid.bits, scales_shape(layer)
    stored = common.signed_scales(layer, rounded)
    tensors: dict[str, Array] = {"weight_scale": stored.scales.reshape(shape)}
    if is_plain(layer):
        tensors["weight"] = _signed(stored.codes)
        zero_point: Array = _signed(stored.zeros).reshape(shape)
    else:
        tensors["weight_packed"] = pack_words(stored.codes, bits).view(np.int32)
        tensors["weight_shape"] = np.array(layer.shape, np.int64)
        words = pack_words(np.ascontiguousarray(stored.zeros.T), bits)
        zero_point = np.ascontiguousarray(words.T).view(np.int32)
    if not layer.grid.sym:
        tensors["weight_zero_point"] = zero_point
    tensors |= encode_inputs(layer, rounded)
    if rounded.input_zero is not None and "input_scale" in tensors and not _sym_inputs(layer):
        tensors["input_zero_point"] = _signed(np.array([rounded.input_zero], np.uint8))
    return tensors


def _sym_inputs(layer: Layer) -> bool:
    return layer.activation is None or layer.activation.sym


def _signed(codes: Codes) -> NDArray[np.int8]:
    """Codes minus 128 as int8: the same bits but for the highest."""
    return (codes ^ np.uint8(128)).view(np.int8)


def decode(layer: Layer, own: Mapping[str, Array]) -> QuantizedWeight:
    (rows, columns), grid, plain = layer.shape, layer.grid, is_plain(layer)
    stored = own.get("weight_zero_point")
    if plain:
        codes = _unsigned(own["weight"])
    elif tuple(own["weight_shape"]) == layer.shape:
        codes = unpack_words(own["weight_packed"].view(np.uint32), grid.bits, columns)
    else:
        raise InputError(
            f"tensor '{layer.module}.weight_shape' says {own['weight_shape'].tolist()}, the weight"
            f" is {list(layer.shape)}"
        )
    shape = grid.scales_shape(layer.shape)
    if stored is None:
        zeros = np.full(shape, grid.mid_code, np.uint8)
    elif plain:
        zeros = _unsigned(stored).reshape(shape)
    else:
        zeros = np.ascontiguousarray(unpack_words(stored.T.view(np.uint32), grid.bits, rows).T)
    input_zero = own.get("input_zero_point")
    weight = QuantizedWeight(
        codes=codes,
        scales=own["weight_scale"].reshape(shape),
        zeros=zeros,
        grid=grid,
        input_scale=input_scale(layer, own),
        input_zero=None if input_zero is None else int(input_zero.reshape(-1)[0]) + 128,
    )
    return common.positive_scales(weight)


def _unsigned(values: Array) -> Codes:
    return (values.astype(np.int16) + 128).astype(np.uint8)
