"""compressed-tensors as llm-compressor writes it and transformers and vLLM read it.

Per linear `<module>`, with out_features N, in_features K, n_groups G (1 where the group is a row):

`pack-quantized`, weights of 2 … 8 bits:

    <module>.weight_packed      I32 [N, ceil(K · bits / 32)]  row n: its codes as a stream of words
    <module>.weight_scale       F16, BF16 or F32 [N, G]
    <module>.weight_shape       I64 [2]                       N, K
    <module>.weight_zero_point  I32 [ceil(N · bits / 32), G]  column g: its zeros as a stream;
                                                              asymmetric grids only

`int-quantized`, weights and inputs of 8 bits:

    <module>.weight             I8 [N, K]                     codes − 128
    <module>.weight_scale       [N, 1], or [1] for a whole-tensor grid
    <module>.weight_zero_point  I8, shaped as the scale       zeros − 128; asymmetric grids only

and in either, where inputs have a static scale:

    <module>.input_scale        [1], rounded to the dtype of the weight's scales
    <module>.input_zero_point   I8 [1]                        zero − 128; asymmetric inputs only

`weight ≈ scales · (codes − zeros)`. A symmetric grid stores no zeros: a mirrored group of
`pack-quantized` is `max − code` with a negative scale. config.py has the declaration in config.json
and its reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import Array, Codes, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.formats.compressed_tensors.config import declare, is_plain, recognise
from ptq_cli.numerics.packing import pack_words, unpack_words, words_width
from ptq_cli.numerics.scales import LEAST_SCALES, SCALE_DTYPES, ScaleMisfit

_NAME = "compressed-tensors"
_LIMITS = common.Limits(
    bits=(2, 3, 4, 5, 6, 7, 8), scale_dtypes=tuple(common.SCALE_WORDS), activations=True
)
_HELD = {"BF16": ("bfloat16",), "F16": ("float16",)}  # models of other dtypes hold every scale


def _misfit(layer: Layer) -> Misfit | None:
    grid, plain = layer.grid, is_plain(layer.grid.bits, layer.activation)
    if found := common.misfit(layer, _NAME, replace(_LIMITS, whole_tensor=plain)):
        return found
    if layer.activation is not None and layer.activation.dynamic and not layer.activation.per_token:
        hint = "--activation-scheme dynamic-token"
        return Misfit(f"{_NAME} has no dynamic scale per tensor", hint)
    if layer.activation is not None and layer.activation.bits != 8:
        reason = f"{_NAME} rounds inputs to 8 bits here, not {layer.activation.bits}"
        return Misfit(reason, "--scheme W8A8")
    if plain and grid.group_size > 0:
        reason = f"{_NAME} W8A8 has no groups of {grid.group_size} columns"
        return Misfit(reason, "--group-size -1")
    model = layer.model_dtype or layer.dtype
    held = _HELD.get(model, _LIMITS.scale_dtypes)
    if grid.scale_dtype not in held:
        return Misfit(
            f"{_NAME} loaders cast scales to the model's {model}, which cannot hold"
            f" {grid.scale_dtype}",
            f"--scale-dtype {held[0]}",
        )
    return None


def _scales_shape(layer: Layer) -> tuple[int, ...]:
    return (1,) if layer.grid.group_size == 0 else layer.grid.scales_shape(layer.shape)


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    (rows, columns), grid, module = layer.shape, layer.grid, layer.module
    scale = common.SCALE_WORDS[grid.scale_dtype]
    shape = _scales_shape(layer)
    specs = [TensorSpec(f"{module}.weight_scale", scale, shape)]
    if is_plain(layer.grid.bits, layer.activation):
        specs.append(TensorSpec(f"{module}.weight", "I8", layer.shape))
        zero_point = TensorSpec(f"{module}.weight_zero_point", "I8", shape)
    else:
        packed = (rows, words_width(columns, grid.bits))
        specs.append(TensorSpec(f"{module}.weight_packed", "I32", packed))
        specs.append(TensorSpec(f"{module}.weight_shape", "I64", (2,)))
        zeros = (words_width(rows, grid.bits), shape[-1])
        zero_point = TensorSpec(f"{module}.weight_zero_point", "I32", zeros)
    if not grid.sym:
        specs.append(zero_point)
    if layer.activation is not None and not layer.activation.dynamic:
        specs.append(TensorSpec(f"{module}.input_scale", scale, (1,)))
        if not layer.activation.sym:
            specs.append(TensorSpec(f"{module}.input_zero_point", "I8", (1,)))
    return tuple(specs)


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    bits, scales_shape = layer.grid.bits, _scales_shape(layer)
    stored = common.signed_scales(layer, rounded)
    tensors: dict[str, Array] = {"weight_scale": stored.scales.reshape(scales_shape)}
    if is_plain(bits, layer.activation):
        tensors["weight"] = _signed(stored.codes)
        zero_point: Array = _signed(stored.zeros).reshape(scales_shape)
    else:
        tensors["weight_packed"] = pack_words(stored.codes, bits).view(np.int32)
        tensors["weight_shape"] = np.array(layer.shape, np.int64)
        words = pack_words(np.ascontiguousarray(stored.zeros.T), bits)
        zero_point = np.ascontiguousarray(words.T).view(np.int32)
    if not layer.grid.sym:
        tensors["weight_zero_point"] = zero_point
    tensors |= _inputs(layer, rounded)
    return {f"{layer.module}.{name}": tensor for name, tensor in tensors.items()}


def _signed(codes: Codes) -> NDArray[np.int8]:
    """Codes minus 128 as int8: the same bits but for the highest."""
    return (codes ^ np.uint8(128)).view(np.int8)


def _inputs(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    """The static scale (and zero) of the inputs, where they have one."""
    if layer.activation is None or layer.activation.dynamic:
        return {}
    if rounded.input_scale is None or (rounded.input_zero is None and not layer.activation.sym):
        raise InputError(
            f"{layer.module}: static inputs want a scale from calibration, and there is none",
            hint="ptq calibrate, or dynamic inputs",
        )
    dtype, least = SCALE_DTYPES[layer.grid.scale_dtype], LEAST_SCALES[layer.grid.scale_dtype]
    with np.errstate(over="ignore"):
        scale = np.array([rounded.input_scale]).astype(dtype)
    if not least <= scale[0].astype(np.float64) < np.inf:
        raise ScaleMisfit(
            f"the scale of its inputs, {rounded.input_scale:.2g}, does not fit"
            f" {layer.grid.scale_dtype}",
            hint="--activation-scheme dynamic-token",
        )
    tensors: dict[str, Array] = {"input_scale": scale}
    if not layer.activation.sym:
        tensors["input_zero_point"] = _signed(np.array([rounded.input_zero], np.uint8))
    return tensors


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    names = [spec.name for spec in _specs(layer)]
    own = {name.rpartition(".")[2]: tensors[name] for name in names}
    (rows, columns), grid = layer.shape, layer.grid
    plain, stored = is_plain(grid.bits, layer.activation), own.get("weight_zero_point")
    if plain:
        codes = _unsigned(own["weight"])
    elif tuple(own["weight_shape"]) == layer.shape:
        codes = unpack_words(own["weight_packed"].view(np.uint32), grid.bits, columns)
    else:
        raise InputError(
            f"tensor '{layer.module}.weight_shape' says {own['weight_shape'].tolist()}, the weight"
            f" is {list(layer.shape)}"
        )
    scales_shape = grid.scales_shape(layer.shape)
    if stored is None:
        zeros = np.full(scales_shape, grid.mid_code, np.uint8)
    elif plain:
        zeros = _unsigned(stored).reshape(scales_shape)
    else:
        zeros = np.ascontiguousarray(unpack_words(stored.T.view(np.uint32), grid.bits, rows).T)
    input_zero = own.get("input_zero_point")
    input_scale = own.get("input_scale")
    weight = QuantizedWeight(
        codes=codes,
        scales=own["weight_scale"].reshape(scales_shape),
        zeros=zeros,
        grid=grid,
        input_scale=None if input_scale is None else float(input_scale.reshape(-1)[0]),
        input_zero=None if input_zero is None else int(input_zero.reshape(-1)[0]) + 128,
    )
    return common.positive_scales(weight)


def _unsigned(values: Array) -> Codes:
    return (values.astype(np.int16) + 128).astype(np.uint8)


def _layers(contents: Contents) -> tuple[Layer, ...]:
    layers = recognise(contents)
    specs = {name: _as_written(spec) for name, spec in contents.specs.items()}
    for layer in layers:
        common.check_specs(specs, _specs(layer), "quantization_config")
    return layers


def _as_written(spec: TensorSpec) -> TensorSpec:
    """A scalar input scale and an int32 shape load too."""
    if spec.name.endswith(".weight_shape"):
        return replace(spec, dtype=spec.dtype.replace("I32", "I64"))
    return replace(spec, shape=spec.shape or (1,))


FORMAT = Format(
    name=_NAME,
    help="compressed-tensors, 2 to 8 bits and W8A8: transformers, vLLM.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    config=declare,
    layers=_layers,
    mirrored=common.may_mirror,
    scale_dtype=lambda model: common.SCALE_NAMES.get(model, "float32"),
    file_metadata={"format": "pt"},
)
