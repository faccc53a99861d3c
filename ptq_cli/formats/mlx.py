"""MLX affine as mlx-lm writes and reads it: 2, 3, 4, 5, 6, 8 bits in groups of 32, 64 or 128.

Per linear or embedding `<module>`, with out_features N, in_features K, n_groups G = K / group_size:

    <module>.weight  U32 [N, K · bits / 32]  row n: its codes as one stream of words
    <module>.scales  F16, BF16 or F32 [N, G]
    <module>.biases  as scales               the value of code 0 (`<module>.bias` is another thing)

`weight ≈ scales · codes + biases`: from zeros, biases are `−zeros · scales` rounded to their dtype.
For symmetric grids that product is exact (zero is a power of two; a mirrored group is `max − code`
with a negative scale, as MLX itself has them); for others the rounding shifts a
group by up to half a unit in the last place of its bias: in bfloat16 a sixteenth of a step at 4
bits, and a whole one at 8 bits, which is refused. A layer is quantized where `.scales` is there;
config.json gives bits and group size, `quantization` for mlx-lm and the same object under
`quantization_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import AS_NAMED, Contents, Format, ModuleTree
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.numerics.packing import pack_words, unpack_words, words_width

_LIMITS = common.Limits(
    bits=(2, 3, 4, 5, 6, 8),
    scale_dtypes=tuple(common.SCALE_WORDS),
    group_sizes=(32, 64, 128),
    whole_row=False,
    embeddings=True,
)


def _misfit(layer: Layer) -> Misfit | None:
    grid = layer.grid
    if grid.bits == 8 and not grid.sym and grid.scale_dtype == "bfloat16":
        return Misfit(
            "mlx rounds −zero · scale to bfloat16, whose 8 digits are off by up to a whole step of"
            " an asymmetric grid of 8 bits",
            "--sym or --scale-dtype float16",
        )
    return common.misfit(layer, "mlx", _LIMITS)


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    (rows, columns), grid, module = layer.shape, layer.grid, layer.module
    word, scales = common.SCALE_WORDS[grid.scale_dtype], grid.scales_shape(layer.shape)
    return (
        TensorSpec(f"{module}.weight", "U32", (rows, words_width(columns, grid.bits))),
        TensorSpec(f"{module}.scales", word, scales),
        TensorSpec(f"{module}.biases", word, scales),
    )


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    zeros, mid = rounded.zeros, layer.grid.mid_code
    if rounded.offsets is None and np.isin(zeros, (mid - 1, mid)).all():
        rounded = common.signed_scales(_as_mirrored(layer), rounded)
    return {
        f"{layer.module}.weight": pack_words(rounded.codes, layer.grid.bits),
        f"{layer.module}.scales": rounded.scales,
        f"{layer.module}.biases": common.offsets(layer, rounded),
    }


def _as_mirrored(layer: Layer) -> Layer:
    """No declaration says whether a layer is symmetric, but its zeros do."""
    return replace(layer, grid=replace(layer.grid, sym=True, mirrored=True))


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    words = tensors[f"{layer.module}.weight"].view(np.uint32)
    scales = tensors[f"{layer.module}.scales"]
    zeros, offsets = common.from_offsets(scales, tensors[f"{layer.module}.biases"], layer.grid)
    codes, grid = unpack_words(words, layer.grid.bits, layer.shape[1]), layer.grid
    if offsets is not None or (zeros != grid.mid_code).any():
        return QuantizedWeight(codes, scales, zeros, grid, offsets=offsets)
    stored = QuantizedWeight(codes, scales, zeros, _as_mirrored(layer).grid)
    return replace(common.positive_scales(stored), grid=grid)


def _config(
    layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree = AS_NAMED
) -> dict[str, Any]:
    base = common.commonest(layers).grid
    config: dict[str, Any] = {"group_size": base.group_size, "bits": base.bits, "mode": "affine"}
    for layer in layers:
        if (layer.grid.group_size, layer.grid.bits) != (base.group_size, base.bits):
            own = {"group_size": layer.grid.group_size, "bits": layer.grid.bits}
            config |= dict.fromkeys(tree.names(layer.module), own)
    return config


def _layers(contents: Contents) -> tuple[Layer, ...]:
    config = contents.config
    settings = common.mapping(config, "quantization", "config.json")
    repeated = common.mapping(config, "quantization_config", "config.json")
    settings = settings or repeated
    if "quant_method" in settings or not {"bits", "group_size"} <= settings.keys():
        return ()
    own = {key: value for key, value in settings.items() if not isinstance(value, Mapping | bool)}
    common.refuse_unknown(own, ("bits", "group_size", "mode"), "quantization")
    if repeated and dict(repeated) != dict(settings):
        raise InputError("config.json: quantization and quantization_config differ")
    modules = common.modules_with(
        contents.specs, ".scales", ".biases", declared="config.json has a quantization"
    )
    return tuple(_layer(module, settings, contents) for module in modules)


def _layer(module: str, settings: Mapping[str, Any], contents: Contents) -> Layer:
    specs, where = contents.specs, f"quantization of {module}"
    entry = settings.get(module, {})
    if entry is False:
        raise InputError(f"module {module!r} is packed, but config.json says it is not")
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: {entry!r} is not understood")
    common.refuse_unknown(entry, ("bits", "group_size", "mode"), where)
    own = {**settings, **entry}
    if own.get("mode", "affine") != "affine":
        raise InputError(f"{where}: mode {own['mode']!r} is not understood, only 'affine'")
    scales = common.tensor(specs, f"{module}.scales", 2)
    grid = Grid(
        bits=common.setting(own, "bits", int, where),
        group_size=common.setting(own, "group_size", int, where),
        sym=False,
        scale_dtype=common.scale_name(scales),
    )
    if grid.bits not in _LIMITS.bits or grid.group_size not in (_LIMITS.group_sizes or ()):
        raise InputError(f"{where}: {grid.bits} bits in groups of {grid.group_size} is not MLX")
    shape = (scales.shape[0], scales.shape[1] * grid.group_size)
    layer = common.linear(module, shape, grid, contents.config)
    common.check_specs(specs, _specs(layer), f"{grid.bits} bits, group_size {grid.group_size}")
    return layer


FORMAT = Format(
    name="mlx",
    help="MLX affine, 2 to 8 bits, groups of 32, 64, 128: mlx-lm.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    config=_config,
    layers=_layers,
    mirrored=common.may_mirror,
    scale_dtype=lambda model: common.SCALE_NAMES.get(model, "float32"),
    file_metadata={"format": "pt"},
    model_config=common.rope_of_old,
    config_keys=("quantization", "quantization_config"),
)
