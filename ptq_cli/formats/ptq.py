"""The native format: any bits 2 … 8, any group size, any width, act-order included; small floats,
and all that GGUF's types hold.

Per linear `<module>`:

    <module>.qweight  U8  [out_features, n_groups · ceil(width · bits / 8)]
                          codes, least significant bit first; every group starts on a byte (at 4
                          bits: low nibble, then high); a short last group is padded with zeros
    <module>.scales   F16, BF16, F32, F8_E8M0 or F8_E4M3  [out_features, n_groups]; [1, 1] for a
                          whole-tensor grid; a row for each block of rows that share their scales
    <module>.zeros    U8  the shape of scales; integers only, and not beside offsets
    <module>.offsets  the dtype and shape of scales, only where groups have offsets of their own
    <module>.super_scales  F16 [out_features, in_features / 256], only where scales are U8 or I8,
    <module>.super_offsets      multiples of it; and offsets those of the second
    <module>.global_scale F32 [1], only with F8_E4M3 scales, which are divided by it
    <module>.g_idx    I32 [in_features], only where act-order reordered the groups
    <module>.input_scale  F32 [1], only where inputs are rounded with a static scale:
                          `input ≈ input_scale · code`, codes within ±127 (±7); or the global
                          scale that the E4M3 scales of groups of inputs are divided by

and per attention whose keys and values are cached in FP8:

    <attention>.k_scale  F16, BF16 or F32  [1], or [key heads, 1, 1]: `key ≈ k_scale · level`, a
    <attention>.v_scale                    level being an E4M3; the same of values

`weight ≈ scales · (codes − zeros)`, or with offsets `scales · codes + offsets`; where scales are
multiples, `super_scales · scales` and `−super_offsets · offsets` stand for them. Where `levels`
says so, codes are the bits of a small float (E2M1, E4M3) or places in the table of IQ4_NL, and
`weight ≈ scales · level`. `width` is the group size, or in_features where the group is a row or the
tensor. The true shape and the grid stand in the file's metadata under `layers`:

    {"<module>": {"shape": [...], "bits": 4, "group_size": 128, "sym": true, "narrow_range": false,
                  "scale_dtype": "float16", "dtype": "BF16", "tensor": "<module>.weight",
                  "method": "gptq"}}

and where they apply `transposed: true` (the checkpoint stores [in_features, out_features]),
`mirrored: true` (a symmetric group's zero is `2^(bits−1)`, or one less), `own_offsets: true`,
`levels: "e2m1"`, `block_rows: 128` and `activation: {"bits": 8, "sym": true, "dynamic": true,
"per_token": true}` (how inputs are rounded; small floats also `levels`, `group_size` and
`scale_dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from typing import Any

import numpy as np

from ptq_cli.core.grid import MULTIPLES, SUPER_BLOCK, Activation, Grid
from ptq_cli.core.kv_cache import find_kv_cache
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.levels import TABLES
from ptq_cli.core.plugins import CacheLayout, Contents, Format
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.numerics.packing import pack_groups, packed_width, unpack_groups

_GRID_KEYS = ("bits", "group_size", "sym", "narrow_range", "scale_dtype")
_MULTIPLES = {name: "U8" if least == 0 else "I8" for name, (least, _) in MULTIPLES.items()}
_SCALE_WORDS = {**common.SCALE_WORDS, "e8m0": "F8_E8M0", "e4m3": "F8_E4M3", **_MULTIPLES}
_SCALES = {"integer": (*common.SCALE_WORDS, *_MULTIPLES), "iq4_nl": ("float16", "int6")}
_SMALL_FLOAT_SCALES = tuple(name for name in _SCALE_WORDS if name not in _MULTIPLES)


def _misfit(layer: Layer) -> Misfit | None:
    if layer.grid.multiples and layer.shape[1] % SUPER_BLOCK:
        return Misfit(
            f"its scales are multiples of one of {SUPER_BLOCK} columns, which do not divide"
            f" in_features {layer.shape[1]}"
        )
    return None


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    grid, (rows, columns) = layer.grid, layer.shape
    row_bytes = grid.n_groups(columns) * packed_width(grid.width(columns), grid.bits)
    scales, word = grid.scales_shape(layer.shape), _SCALE_WORDS[grid.scale_dtype]
    specs = [
        TensorSpec(f"{layer.module}.qweight", "U8", (rows, row_bytes)),
        TensorSpec(f"{layer.module}.scales", word, scales),
    ]
    if grid.own_offsets:
        specs.append(TensorSpec(f"{layer.module}.offsets", word, scales))
    for name in _of_super_blocks(grid):
        shape = (rows, columns // SUPER_BLOCK)
        specs.append(TensorSpec(f"{layer.module}.{name}", "F16", shape))
    if _has_zeros(grid):
        specs.append(TensorSpec(f"{layer.module}.zeros", "U8", scales))
    if grid.scale_dtype == "e4m3":
        specs.append(TensorSpec(f"{layer.module}.global_scale", "F32", (1,)))
    if layer.reordered:
        specs.append(TensorSpec(f"{layer.module}.g_idx", "I32", (columns,)))
    if layer.calibrated_inputs:
        specs.append(TensorSpec(f"{layer.module}.input_scale", "F32", (1,)))
    return tuple(specs)


def _has_zeros(grid: Grid) -> bool:
    return grid.integers and not grid.own_offsets


def _of_super_blocks(grid: Grid) -> tuple[str, ...]:
    """Names of the tensors that scales and offsets are multiples of."""
    if not grid.multiples:
        return ()
    return ("super_scales", "super_offsets") if grid.own_offsets else ("super_scales",)


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    width = layer.grid.width(layer.shape[1])
    tensors: dict[str, Array] = {
        f"{layer.module}.qweight": pack_groups(rounded.codes, layer.grid.bits, width),
        f"{layer.module}.scales": rounded.scales,
    }
    if layer.grid.multiples:
        for name in ("offsets",) * layer.grid.own_offsets + _of_super_blocks(layer.grid):
            tensors[f"{layer.module}.{name}"] = getattr(rounded, name)
    elif layer.grid.own_offsets:
        tensors[f"{layer.module}.offsets"] = common.offsets(layer, rounded)
    if _has_zeros(layer.grid):
        tensors[f"{layer.module}.zeros"] = common.integer_zeros(layer, rounded)
    if layer.grid.scale_dtype == "e4m3":
        tensors[f"{layer.module}.global_scale"] = np.array([rounded.grid.global_scale], np.float32)
    if layer.reordered:
        tensors[f"{layer.module}.g_idx"] = rounded.column_groups()
    if layer.calibrated_inputs:
        if rounded.input_scale is None:
            raise InputError(f"{layer.module}: no static scale of its inputs")
        tensors[f"{layer.module}.input_scale"] = np.array([rounded.input_scale], np.float32)
    return tensors


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    columns = layer.shape[1]
    packed = tensors[f"{layer.module}.qweight"]
    codes = unpack_groups(packed, layer.grid.bits, layer.grid.width(columns), columns)
    g_idx, scales = tensors.get(f"{layer.module}.g_idx"), tensors[f"{layer.module}.scales"]
    zeros, grid = tensors.get(f"{layer.module}.zeros"), layer.grid
    if grid.scale_dtype == "e4m3":
        grid = replace(grid, global_scale=_global_scale(layer, tensors))
    input_scale = tensors.get(f"{layer.module}.input_scale")
    offsets = tensors.get(f"{layer.module}.offsets")
    for name, values in (("scales", scales), ("offsets", offsets)):
        _check_multiples(f"{layer.module}.{name}", values, grid)
    return QuantizedWeight(
        codes=codes,
        scales=scales,
        zeros=np.zeros(scales.shape, np.uint8) if zeros is None else zeros,
        grid=grid,
        g_idx=None if g_idx is None else np.asarray(g_idx, np.int32),
        offsets=offsets,
        input_scale=None if input_scale is None else float(input_scale[0]),
        super_scales=tensors.get(f"{layer.module}.super_scales"),
        super_offsets=tensors.get(f"{layer.module}.super_offsets"),
    )


def _check_multiples(name: str, values: Array | None, grid: Grid) -> None:
    """Raises InputError for a multiple that its few bits do not hold."""
    if values is None or grid.multiples is None or not values.size:
        return
    (least, greatest), low, high = grid.multiples, int(values.min()), int(values.max())
    if low < least or high > greatest:
        raise InputError(f"tensor {name!r} holds {low} … {high}, not {least} … {greatest}")


def _global_scale(layer: Layer, tensors: Mapping[str, Array]) -> float:
    found = float(tensors[f"{layer.module}.global_scale"][0])
    if not 0 < found < float("inf"):
        raise InputError(f"tensor '{layer.module}.global_scale' is {found}, not a positive number")
    return found


def _by_rows(layer: Layer) -> bool:
    static = layer.calibrated_inputs
    own = layer.reordered or static or layer.grid.scale_dtype == "e4m3"
    return layer.grid.by_rows and not own


def _metadata(layers: Sequence[Layer]) -> dict[str, Any]:
    return {
        layer.module: {key: getattr(layer.grid, key) for key in _GRID_KEYS}
        | {
            "shape": list(layer.full_shape),
            "dtype": layer.dtype,
            "tensor": layer.tensor,
            "method": layer.method,
        }
        | ({"transposed": True} if layer.transposed else {})
        | ({"mirrored": True} if layer.grid.mirrored else {})
        | ({"own_offsets": True} if layer.grid.own_offsets else {})
        | ({} if layer.grid.integers else {"levels": layer.grid.levels})
        | ({"block_rows": layer.grid.block_rows} if layer.grid.block_rows > 1 else {})
        | ({"activation": _activation(layer.activation)} if layer.activation else {})
        for layer in layers
    }


def _activation(activation: Activation) -> dict[str, Any]:
    """Integers have no more to say than their first four fields."""
    stated, plain = asdict(activation), asdict(Activation())
    first = ("bits", "sym", "dynamic", "per_token")
    return {key: value for key, value in stated.items() if key in first or value != plain[key]}


def _layers(contents: Contents) -> tuple[Layer, ...]:
    """The layers that the metadata names, each checked against the headers."""
    layers = tuple(_layer(module, entry, contents) for module, entry in contents.metadata.items())
    for layer in layers:
        common.check_specs(contents.specs, _specs(layer), "the metadata")
    return layers


def _layer(module: str, entry: Any, contents: Contents) -> Layer:
    try:
        grid = Grid(
            **{key: entry[key] for key in _GRID_KEYS},
            mirrored=entry.get("mirrored", False) is True,
            own_offsets=entry.get("own_offsets", False) is True,
            levels=entry.get("levels", "integer"),
            block_rows=entry.get("block_rows", 1),
        )
        full_shape = tuple(int(size) for size in entry["shape"])
        tensor, dtype, method = (str(entry[key]) for key in ("tensor", "dtype", "method"))
        activation = entry.get("activation")
        activation = None if activation is None else Activation(**activation)
        transposed = entry.get("transposed", False) is True
        kinds = [type(entry[key]) for key in _GRID_KEYS]
        if kinds != [int, int, bool, bool, str] or min(full_shape) < 1 or not _makes_sense(grid):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"module {module!r}: its entry in the metadata is damaged") from error
    shape = (full_shape[0], prod(full_shape[1:]))
    columns = shape[0] if transposed else shape[1]
    if grid.multiples and columns % SUPER_BLOCK:
        raise InputError(f"module {module!r}: {columns} columns are no whole super-blocks")
    return Layer(
        module=module,
        tensor=tensor,
        shape=shape[::-1] if transposed else shape,
        full_shape=full_shape,
        dtype=dtype,
        grid=grid,
        reordered=f"{module}.g_idx" in contents.specs,
        method=method,
        transposed=transposed,
        activation=activation,
    )


def _makes_sense(grid: Grid) -> bool:
    """Whether there is such a grid."""
    if grid.scale_dtype not in _SCALES.get(grid.levels, _SMALL_FLOAT_SCALES):
        return False
    if not grid.integers and (grid.own_offsets or 2**grid.bits != len(TABLES[grid.levels])):
        return False
    if type(grid.block_rows) is not int or grid.block_rows < 1:
        return False
    if not 2 <= grid.bits <= 8 or grid.group_size < -1:
        return False
    if grid.own_offsets and (grid.sym or grid.mirrored):
        return False
    alone = grid.block_rows == 1 and not grid.mirrored
    if grid.multiples and not (grid.group_size in (16, 32) and alone):
        return False
    return not grid.mirrored or (grid.sym and not grid.narrow_range)


FORMAT = Format(
    name="ptq",
    help="Native: any bits 2 to 8, any group size, any width, small floats, GGUF's types.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    metadata=_metadata,
    layers=_layers,
    by_rows=_by_rows,
    mirrored=common.may_mirror,
    kv_cache=CacheLayout(
        declare=lambda cache: {}, read=lambda contents: find_kv_cache(contents.specs)
    ),
)
