"""MLX as mlx-lm writes and reads it, in four modes.

`affine`, 2, 3, 4, 5, 6, 8 bits in groups of 32, 64 or 128. Per linear or embedding `<module>`, with
out_features N, in_features K, n_groups G = K / group_size:

    <module>.weight  U32 [N, K · bits / 32]  row n: its codes as one stream of words
    <module>.scales  F16, BF16 or F32 [N, G]
    <module>.biases  as scales               the value of code 0 (`<module>.bias` is another thing)

`mxfp4`, `mxfp8` (groups of 32) and `nvfp4` (groups of 16):

    <module>.weight  U32 [N, K · bits / 32]  the bits of FP4 (E2M1) or FP8 (E4M3) as a stream
    <module>.scales  U8 [N, G]               exponents, 2^(byte − 127); of nvfp4 the bits of an E4M3

In `affine`, `weight ≈ scales · codes + biases`: from zeros, biases are `−zeros · scales` rounded to
their dtype. For symmetric grids that product is exact (zero is a power of two; a mirrored group is
`max − code` with a negative scale, as MLX itself has them); for others the rounding shifts a group
by up to half a unit in the last place of its bias: in bfloat16 a sixteenth of a step at 4 bits, and
a whole one at 8 bits, which is refused. The others are `scales · code`; MLX has no global scale for
nvfp4, so that is 1. A layer is quantized where `.scales` is there; config.json gives bits, group
size and mode, `quantization` for mlx-lm and the same object under `quantization_config`.
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
from ptq_cli.formats import common, fused, small_floats
from ptq_cli.numerics.packing import pack_words, unpack_words, words_width

_LIMITS = common.Limits(
    bits=(2, 3, 4, 5, 6, 8),
    scale_dtypes=tuple(common.SCALE_WORDS),
    group_sizes=(32, 64, 128),
    whole_row=False,
    embeddings=True,
)


_FLOAT_LIMITS = common.Limits(
    bits=(4, 8), scale_dtypes=("e8m0", "e4m3"), levels=("e2m1", "e4m3"), embeddings=True
)
_WIDTHS = {("e2m1", "e4m3"): 16, ("e2m1", "e8m0"): 32, ("e4m3", "e8m0"): 32}
_MODES = {
    "mxfp4": Grid(4, 32, levels="e2m1", scale_dtype="e8m0"),
    "mxfp8": Grid(8, 32, levels="e4m3", scale_dtype="e8m0"),
    "nvfp4": Grid(4, 16, levels="e2m1", scale_dtype="e4m3"),
}


def _misfit(layer: Layer) -> Misfit | None:
    grid = layer.grid
    if not grid.integers:
        return _float_misfit(layer)
    if grid.bits == 8 and not grid.sym and grid.scale_dtype == "bfloat16":
        return Misfit(
            "mlx rounds −zero · scale to bfloat16, whose 8 digits are off by up to a whole step of"
            " an asymmetric grid of 8 bits",
            "--sym or --scale-dtype float16",
        )
    return common.misfit(layer, "mlx", _LIMITS)


def _float_misfit(layer: Layer) -> Misfit | None:
    grid = layer.grid
    if (
        grid.levels == "e4m3" and grid.scale_dtype in common.SCALE_WORDS
    ):  # no option of scales would help
        reason = f"mlx has no FP8 with {grid.scale_dtype} scales"
        return Misfit(reason, "--format compressed-tensors")
    found = common.misfit(layer, "mlx", _FLOAT_LIMITS)
    return small_floats.grid_misfit(layer, "mlx", _WIDTHS) if found is None else found


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    (rows, columns), grid, module = layer.shape, layer.grid, layer.module
    weight = TensorSpec(f"{module}.weight", "U32", (rows, words_width(columns, grid.bits)))
    scales = grid.scales_shape(layer.shape)
    if not grid.integers:
        return weight, TensorSpec(f"{module}.scales", "U8", scales)
    word = common.SCALE_WORDS[grid.scale_dtype]
    return (
        weight,
        TensorSpec(f"{module}.scales", word, scales),
        TensorSpec(f"{module}.biases", word, scales),
    )


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    if not layer.grid.integers:
        return _encode_floats(layer, rounded)
    zeros, mid = rounded.zeros, layer.grid.mid_code
    if rounded.offsets is None and np.isin(zeros, (mid - 1, mid)).all():
        rounded = common.signed_scales(_as_mirrored(layer), rounded)
    return {
        f"{layer.module}.weight": pack_words(rounded.codes, layer.grid.bits),
        f"{layer.module}.scales": rounded.scales,
        f"{layer.module}.biases": common.offsets(layer, rounded),
    }


def _encode_floats(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    if rounded.grid.global_scale != 1:
        raise InputError(
            f"{layer.module}: mlx has no global scale of NVFP4, and this weight has one",
            hint="quantize the float model with --format mlx, or --format compressed-tensors",
        )
    return {
        f"{layer.module}.weight": pack_words(rounded.codes, layer.grid.bits),
        f"{layer.module}.scales": rounded.scales.view(np.uint8),
    }


def _as_mirrored(layer: Layer) -> Layer:
    """No declaration says whether a layer is symmetric, but its zeros do."""
    return replace(layer, grid=replace(layer.grid, sym=True, mirrored=True))


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    if not layer.grid.integers:
        return _decode_floats(layer, tensors)
    words = tensors[f"{layer.module}.weight"].view(np.uint32)
    scales = tensors[f"{layer.module}.scales"]
    zeros, offsets = common.from_offsets(scales, tensors[f"{layer.module}.biases"], layer.grid)
    codes, grid = unpack_words(words, layer.grid.bits, layer.shape[1]), layer.grid
    if offsets is not None or (zeros != grid.mid_code).any():
        return QuantizedWeight(codes, scales, zeros, grid, offsets=offsets)
    stored = QuantizedWeight(codes, scales, zeros, _as_mirrored(layer).grid)
    return replace(common.positive_scales(stored), grid=grid)


def _decode_floats(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    name, grid = f"{layer.module}.scales", layer.grid
    read = small_floats.e8m0_scales if grid.scale_dtype == "e8m0" else small_floats.e4m3_scales
    words = tensors[f"{layer.module}.weight"].view(np.uint32)
    codes = unpack_words(words, grid.bits, layer.shape[1])
    if grid.bits == 8:
        codes = small_floats.fp8_codes(f"{layer.module}.weight", codes)
    zeros = small_floats.no_zeros(layer)
    return QuantizedWeight(codes, read(name, tensors[name]), zeros, grid)


def _mode(grid: Grid) -> str:
    if grid.integers:
        return "affine"
    key = (grid.levels, grid.scale_dtype)
    return next(mode for mode, own in _MODES.items() if (own.levels, own.scale_dtype) == key)


def _declared(grid: Grid) -> dict[str, Any]:
    return {"group_size": grid.group_size, "bits": grid.bits, "mode": _mode(grid)}


def _config(
    layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree = AS_NAMED
) -> dict[str, Any]:
    base = _declared(fused.commonest(layers).grid)
    config = dict(base)
    for layer in layers:
        own = _declared(layer.grid)
        if own != base:
            if own["mode"] == "affine":  # mlx-lm takes an entry without a mode for that
                del own["mode"]
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
    packed = [name for name, spec in contents.specs.items() if spec.dtype == "U32"]
    lone = [name for name in packed if name.removesuffix(".weight") not in modules]
    if lone:
        raise InputError(f"tensor {lone[0]!r} is packed, but has no scales beside it")
    return tuple(_layer(module, settings, contents) for module in modules)


def _layer(module: str, settings: Mapping[str, Any], contents: Contents) -> Layer:
    specs, where = contents.specs, f"quantization of {module}"
    entry = settings.get(module, {})
    if entry is False:
        raise InputError(f"module {module!r} is packed, but config.json says it is not")
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: {entry!r} is not understood")
    common.refuse_unknown(entry, ("bits", "group_size", "mode"), where)
    own = {**settings, **({"mode": "affine"} if entry else {}), **entry}
    scales, mode = common.tensor(specs, f"{module}.scales", 2), own.get("mode", "affine")
    if mode != "affine" and mode not in _MODES:
        known = ", ".join(map(repr, ("affine", *_MODES)))
        raise InputError(f"{where}: mode {mode!r} is not understood, only {known}")
    bits = common.setting(own, "bits", int, where)
    size = common.setting(own, "group_size", int, where)
    if mode == "affine":
        grid = Grid(bits, size, sym=False, scale_dtype=common.scale_name(scales))
        fits = bits in _LIMITS.bits and size in (_LIMITS.group_sizes or ())
    else:
        grid = _MODES[mode]
        fits = (bits, size) == (grid.bits, grid.group_size)
    if not fits:
        raise InputError(f"{where}: {bits} bits in groups of {size} is not MLX ({mode})")
    shape = (scales.shape[0], scales.shape[1] * grid.group_size)
    layer = common.linear(module, shape, grid, contents.config)
    common.check_specs(specs, _specs(layer), f"{grid.bits} bits, group_size {grid.group_size}")
    return layer


def _by_rows(layer: Layer) -> bool:
    return not layer.grid.integers


FORMAT = Format(
    name="mlx",
    help="MLX, 2 to 8 bits in groups of 32, 64, 128, MXFP4, MXFP8, NVFP4: mlx-lm.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    config=_config,
    layers=_layers,
    by_rows=_by_rows,
    mirrored=common.may_mirror,
    global_scale=False,
    scale_dtype=lambda model: common.SCALE_NAMES.get(model, "float32"),
    file_metadata={"format": "pt"},
    model_config=common.rope_of_old,
    config_keys=("quantization", "quantization_config"),
)
