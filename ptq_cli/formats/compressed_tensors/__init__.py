"""compressed-tensors as llm-compressor writes it and transformers and vLLM read it.

Per linear `<module>`, with out_features N, in_features K, n_groups G (1 where the group is a row):

`pack-quantized`, integers of 2 … 8 bits:

    <module>.weight_packed      I32 [N, ceil(K · bits / 32)]  row n: its codes as a stream of words
    <module>.weight_scale       F16, BF16 or F32 [N, G]
    <module>.weight_shape       I64 [2]                       N, K
    <module>.weight_zero_point  I32 [ceil(N · bits / 32), G]  column g: its zeros as a stream;
                                                              asymmetric grids only

`int-quantized`, integers of 8 bits, of weights and inputs:

    <module>.weight             I8 [N, K]                     codes − 128
    <module>.weight_scale       [N, 1], or [1] for a whole-tensor grid
    <module>.weight_zero_point  I8, shaped as the scale       zeros − 128; asymmetric grids only

`float-quantized` (with rounded inputs), `naive-quantized` (without), `mxfp8-quantized`:

    <module>.weight             F8_E4M3 [N, K]
    <module>.weight_scale       F16, BF16 or F32: [N, 1], [1] for the whole tensor, or
                                [ceil(N / 128), K / 128] for blocks; mxfp8: U8 [N, K / 32],
                                exponents, 2^(byte − 127)

`nvfp4-pack-quantized` and `mxfp4-pack-quantized`:

    <module>.weight_packed        U8 [N, K / 2]        two codes of E2M1 to a byte, the lower first
    <module>.weight_scale         nvfp4: F8_E4M3 [N, K / 16]; mxfp4: U8 [N, K / 32], exponents
    <module>.weight_global_scale  nvfp4: F32 [1], by which the scales are divided

and in any, where inputs have a static scale:

    <module>.input_scale        [1], rounded to the dtype of the weight's scales
    <module>.input_zero_point   I8 [1]                        zero − 128; asymmetric inputs only
    <module>.input_global_scale F32 [1]; nvfp4: divides the scales that groups of 16 find

and of an attention whose cache is rounded to FP8, each [1] or [key heads, 1, 1]:

    <attention>.k_scale, <attention>.v_scale    as kv_cache.py says

`weight ≈ scales · (codes − zeros)`, or for floats `scales · code`. A symmetric grid stores no
zeros: a mirrored group of `pack-quantized` is `max − code` with a negative scale. config.py and
schemes.py have the declaration in config.json and its reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.formats import common
from ptq_cli.formats.compressed_tensors import floats, integers
from ptq_cli.formats.compressed_tensors.config import declare, recognise
from ptq_cli.formats.compressed_tensors.kv_cache import KV_CACHE

_NAME = "compressed-tensors"
_HELD = {"BF16": ("bfloat16",), "F16": ("float16",)}  # models of other dtypes hold every scale


def _of(layer: Layer) -> ModuleType:
    """Where the layouts of its numbers are."""
    return integers if layer.grid.integers else floats


def _misfit(layer: Layer) -> Misfit | None:
    grid = layer.grid
    found: Misfit | None = _of(layer).misfit(layer, _NAME)
    if found is not None:
        return found
    model = layer.model_dtype or layer.dtype
    held = _HELD.get(model, tuple(common.SCALE_WORDS))
    if grid.scale_dtype in common.SCALE_WORDS and grid.scale_dtype not in held:
        return Misfit(
            f"{_NAME} loaders cast scales to the model's {model}, which cannot hold"
            f" {grid.scale_dtype}",
            f"--scale-dtype {held[0]}",
        )
    return None


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    return tuple(_of(layer).specs(layer))


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    tensors = _of(layer).encode(layer, rounded)
    return {f"{layer.module}.{name}": tensor for name, tensor in tensors.items()}


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    own = {spec.name.rpartition(".")[2]: tensors[spec.name] for spec in _specs(layer)}
    weight: QuantizedWeight = _of(layer).decode(layer, own)
    return weight


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


def _by_rows(layer: Layer) -> bool:
    """Small floats with nothing for the whole tensor: no global scale, no static one of inputs."""
    grid, alone = layer.grid, layer.activation is None or not layer.activation.calibrated
    return not grid.integers and grid.by_rows and grid.scale_dtype != "e4m3" and alone


FORMAT = Format(
    name=_NAME,
    help="compressed-tensors, 2 to 8 bits, W8A8, FP8, NVFP4, MXFP4, MXFP8: transformers, vLLM.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    config=declare,
    layers=_layers,
    mirrored=common.may_mirror,
    scale_dtype=lambda model: common.SCALE_NAMES.get(model, "float32"),
    by_rows=_by_rows,
    file_metadata={"format": "pt"},
    kv_cache=KV_CACHE,
)
