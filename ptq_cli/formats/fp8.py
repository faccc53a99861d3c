"""Hugging Face `fp8`, as DeepSeek and Qwen ship it: FP8 in blocks of 128 × 128, or per tensor.

Per linear `<module>`, with out_features N, in_features K:

    <module>.weight            F8_E4M3 [N, K]
    <module>.weight_scale_inv  F32 [ceil(N / 128), K / 128]; per tensor F32 []. In spite of its name
                               it multiplies; other files have BF16, or F8_E8M0 (`scale_fmt` ue8m0)
    <module>.activation_scale  F32 [], only with static scales of the inputs (per tensor)

`weight ≈ weight_scale_inv · weight`. config.json has `weight_block_size`, null per tensor, and in
`modules_to_not_convert` what is left dense. With dynamic scales inputs are rounded in groups of 128
columns of a token where weights are in blocks, else by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import AS_NAMED, Contents, Format, ModuleTree
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common, fused, small_floats
from ptq_cli.formats.declared import left_dense
from ptq_cli.formats.small_floats import E4M3, FP8_GROUPS, FP8_TENSOR, FP8_TOKENS

_NAME, _WHERE = "fp8", "quantization_config"
_LIMITS = common.Limits(
    bits=(8,), scale_dtypes=("float32", "bfloat16", "e8m0"), activations=True, levels=("e4m3",)
)
_WORDS = {"float32": "F32", "bfloat16": "BF16", "e8m0": "F8_E8M0"}
_STORED = {word: name for name, word in _WORDS.items()}
_KNOWN = (
    "quant_method", "activation_scheme", "weight_block_size", "fmt", "modules_to_not_convert",
    "ignored_layers", "scale_fmt", "dequantize",
)  # fmt: skip


def _misfit(layer: Layer) -> Misfit | None:
    if found := common.misfit(layer, _NAME, _LIMITS):
        return found
    if found := small_floats.grid_misfit(layer, _NAME, {}):
        return found
    if layer.grid.group_size == -1:
        return Misfit(f"{_NAME} has no scales for rows", "--scheme FP8_BLOCK")
    block = small_floats.is_block(layer.grid)
    if not small_floats.same_inputs(layer.activation, *_inputs(block)):
        how = "in groups of 128" if block else "by token, or with a static scale"
        return Misfit(f"{_NAME} rounds inputs to FP8 {how}", "--format compressed-tensors")
    if common.is_head(layer):
        return Misfit(f"runtimes (vLLM) leave lm_head dense in {_NAME}", f"--ignore {layer.module}")
    return None


def _inputs(block: bool) -> tuple[Activation, ...]:
    return (FP8_GROUPS,) if block else (FP8_TOKENS, FP8_TENSOR)


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    grid, module = layer.grid, layer.module
    shape = grid.scales_shape(layer.shape) if small_floats.is_block(grid) else ()
    specs = [
        TensorSpec(f"{module}.weight", "F8_E4M3", layer.shape),
        TensorSpec(f"{module}.weight_scale_inv", _WORDS[grid.scale_dtype], shape),
    ]
    if layer.static_inputs:
        specs.append(TensorSpec(f"{module}.activation_scale", "F32", ()))
    return tuple(specs)


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    scales, module = rounded.scales, layer.module
    tensors: dict[str, Array] = {
        f"{module}.weight": rounded.codes.view(E4M3),
        f"{module}.weight_scale_inv": (
            scales if small_floats.is_block(layer.grid) else scales.reshape(())
        ),
    }
    if layer.static_inputs:
        if rounded.input_scale is None:
            raise InputError(
                f"{module}: static inputs want a scale from calibration, and there is none",
                hint="ptq calibrate, or dynamic inputs",
            )
        name = f"{module}.activation_scale"
        tensors[name] = small_floats.one_number(name, rounded.input_scale).reshape(())
    return tensors


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    module, grid = layer.module, layer.grid
    name, divisor = f"{module}.weight_scale_inv", f"{module}.activation_scale"
    scales = tensors[name].reshape(grid.scales_shape(layer.shape))
    return QuantizedWeight(
        codes=small_floats.fp8_codes(f"{module}.weight", tensors[f"{module}.weight"]),
        scales=small_floats.e8m0_scales(name, scales) if grid.scale_dtype == "e8m0" else scales,
        zeros=small_floats.no_zeros(layer),
        grid=grid,
        input_scale=(
            small_floats.positive(divisor, tensors[divisor]) if layer.static_inputs else None
        ),
    )


def _config(
    layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree = AS_NAMED
) -> dict[str, Any]:
    fused.check_fused(layers, dense)
    schemes = {fused.scheme(layer) for layer in layers}
    if len(schemes) > 1:
        raise InputError(
            f"{_NAME} has one scheme for all layers, not {len(schemes)}",
            hint="--format compressed-tensors",
        )
    left = common.left_dense_names(layers, dense, tree)
    for module, entry in left_dense((layer.module for layer in layers), left):
        raise InputError(f"{_NAME} cannot leave {entry} dense without {module} too")
    grid = layers[0].grid
    block = [grid.block_rows, grid.group_size] if small_floats.is_block(grid) else None
    return {
        "quant_method": "fp8",
        "activation_scheme": "static" if layers[0].static_inputs else "dynamic",
        "weight_block_size": block,
        "fmt": "e4m3",
        "modules_to_not_convert": left,
    } | ({"scale_fmt": "ue8m0"} if grid.scale_dtype == "e8m0" else {})


def _layers(contents: Contents) -> tuple[Layer, ...]:
    settings = common.mapping(contents.config, _WHERE, "config.json")
    if settings.get("quant_method") != "fp8":
        return ()
    common.refuse_unknown(settings, _KNOWN, _WHERE)
    if str(settings.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise InputError(f"{_WHERE}: fmt {settings['fmt']!r} is not understood, only 'e4m3'")
    scheme = settings.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise InputError(f"{_WHERE}: activation_scheme {scheme!r} is not understood")
    block = settings.get("weight_block_size")
    if block is not None and not small_floats.is_pair(block):
        raise InputError(f"{_WHERE}: weight_block_size {block!r} is not a pair of numbers above 1")
    modules = common.modules_with(
        contents.specs, ".weight_scale_inv", declared=f"{_WHERE} says FP8"
    )
    small_floats.refuse_without_scales(modules, contents, "weight_scale_inv")
    left = [
        name
        for key in ("modules_to_not_convert", "ignored_layers")
        for name in common.strings(settings, key, _WHERE)
    ]
    for module, entry in left_dense(modules, left):
        raise InputError(f"module {module!r} is packed, but {entry!r} says it is left dense")
    layers = tuple(_layer(module, block, scheme == "static", contents) for module in modules)
    fused.check_fused(layers)
    return layers


def _layer(module: str, block: list[int] | None, static: bool, contents: Contents) -> Layer:
    specs, name = contents.specs, f"{module}.weight_scale_inv"
    rows, columns = common.tensor(specs, f"{module}.weight", 2).shape
    scales = specs[name]
    if scales.dtype not in _STORED:
        raise InputError(f"tensor {name!r} is {scales.dtype}; scales are F32, BF16 or F8_E8M0")
    grid = Grid(8, 0, levels="e4m3", scale_dtype=_STORED[scales.dtype])
    activation = FP8_TENSOR if static else FP8_TOKENS
    if block is not None:
        grid = replace(grid, block_rows=block[0], group_size=block[1])
        activation = replace(FP8_GROUPS, group_size=block[1])
    layer = common.linear(module, (rows, columns), grid, contents.config)
    layer = replace(layer, activation=activation)
    flat = {key: _flat(spec) if block is None else spec for key, spec in specs.items()}
    common.check_specs(flat, _specs(layer), f"{_WHERE} (weight_block_size {block})")
    return layer


def _flat(spec: TensorSpec) -> TensorSpec:
    """A scale of shape [1] loads too, and [1, 1], as transformers writes it."""
    one = spec.shape in ((1,), (1, 1)) and spec.name.endswith(("_scale_inv", "_scale"))
    return replace(spec, shape=()) if one else spec


FORMAT = Format(
    name=_NAME,
    help="Hugging Face FP8 (weight_scale_inv), in blocks, per tensor: transformers, vLLM.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    config=_config,
    layers=_layers,
    scale_dtype=lambda model: "float32",
    file_metadata={"format": "pt"},
)
