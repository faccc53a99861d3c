"""The native format: any bits 2 … 8, any group size, any width, act-order included; small floats.

Per linear `<module>`:

    <module>.qweight  U8  [out_features, n_groups · ceil(width · bits / 8)]
                          codes, least significant bit first; every group starts on a byte (at 4
                          bits: low nibble, then high); a short last group is padded with zeros
    <module>.scales   F16, BF16, F32, F8_E8M0 or F8_E4M3  [out_features, n_groups]; [1, 1] for a
                          whole-tensor grid; a row for each block of rows that share their scales
    <module>.zeros    U8  the shape of scales; integers only
    <module>.global_scale F32 [1], only with F8_E4M3 scales, which are divided by it
    <module>.g_idx    I32 [in_features], only where act-order reordered the groups
    <module>.input_scale  F32 [1], only where inputs are rounded with a static scale:
                          `input ≈ input_scale · code`, codes within ±127 (±7); or the global
                          scale that the E4M3 scales of groups of inputs are divided by

and per attention whose keys and values are cached in FP8:

    <attention>.k_scale  F16, BF16 or F32  [1], or [key heads, 1, 1]: `key ≈ k_scale · level`, a
    <attention>.v_scale                    level being an E4M3; the same of values

`weight ≈ scales · (codes − zeros)`; where `levels` says so, codes are the bits of a small float
(E2M1, E4M3), and `weight ≈ scales · level`. `width` is the group size, or in_features where the
group is a row or the tensor. The true shape and the grid stand in the file's metadata under
`layers`:

    {"<module>": {"shape": [...], "bits": 4, "group_size": 128, "sym": true, "narrow_range": false,
                  "scale_dtype": "float16", "dtype": "BF16", "tensor": "<module>.weight",
                  "method": "gptq"}}

and where they apply `transposed: true` (the checkpoint stores [in_features, out_features]),
`mirrored: true` (a symmetric group's zero is `2^(bits−1)`, or one less), `levels: "e2m1"`,
`block_rows: 128` and `activation: {"bits": 8, "sym": true, "dynamic": true, "per_token": true}`
(how inputs are rounded; small floats also `levels`, `group_size` and `scale_dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from typing import Any

import numpy as np

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.kv_cache import find_kv_cache
from ptq_cli.core.layer import Layer
from ptq_cli.core.levels import SMALL_FLOATS
from ptq_cli.core.plugins import CacheLayout, Contents, Format
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.numerics.packing import pack_groups, packed_width, unpack_groups

_GRID_KEYS = ("bits", "group_size", "sym", "narrow_range", "scale_dtype")
_SCALE_WORDS = {**common.SCALE_WORDS, "e8m0": "F8_E8M0", "e4m3": "F8_E4M3"}
_INTEGER_SCALES = tuple(common.SCALE_WORDS)


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    grid, (rows, columns) = layer.grid, layer.shape
    row_bytes = grid.n_groups(columns) * packed_width(grid.width(columns), grid.bits)
    scales = grid.scales_shape(layer.shape)
    specs = [
        TensorSpec(f"{layer.module}.qweight", "U8", (rows, row_bytes)),
        TensorSpec(f"{layer.module}.scales", _SCALE_WORDS[grid.scale_dtype], scales),
    ]
    if grid.integers:
        specs.append(TensorSpec(f"{layer.module}.zeros", "U8", scales))
    if grid.scale_dtype == "e4m3":
        specs.append(TensorSpec(f"{layer.module}.global_scale", "F32", (1,)))
    if layer.reordered:
        specs.append(TensorSpec(f"{layer.module}.g_idx", "I32", (columns,)))
    if layer.calibrated_inputs:
        specs.append(TensorSpec(f"{layer.module}.input_scale", "F32", (1,)))
    return tuple(specs)


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    width = layer.grid.width(layer.shape[1])
    tensors: dict[str, Array] = {
        f"{layer.module}.qweight": pack_groups(rounded.codes, layer.grid.bits, width),
        f"{layer.module}.scales": rounded.scales,
    }
    if layer.grid.integers:
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
    return QuantizedWeight(
        codes=codes,
        scales=scales,
        zeros=np.zeros(scales.shape, np.uint8) if zeros is None else zeros,
        grid=grid,
        g_idx=None if g_idx is None else np.asarray(g_idx, np.int32),
        input_scale=None if input_scale is None else float(input_scale[0]),
    )


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
        mirrored = entry.get("mirrored", False) is True
        grid = Grid(
            **{key: entry[key] for key in _GRID_KEYS},
            mirrored=mirrored,
            levels=entry.get("levels", "integer"),
            block_rows=entry.get("block_rows", 1),
        )
        full_shape = tuple(int(size) for size in entry["shape"])
        tensor, dtype, method = (str(entry[key]) for key in ("tensor", "dtype", "method"))
        activation = entry.get("activation")
        activation = None if activation is None else Activation(**activation)
        transposed = entry.get("transposed", False) is True
        kinds = [type(entry[key]) for key in _GRID_KEYS]
        scale_dtypes = _INTEGER_SCALES if grid.levels == "integer" else tuple(_SCALE_WORDS)
        if kinds != [int, int, bool, bool, str] or grid.scale_dtype not in scale_dtypes:
            raise ValueError
        if grid.levels != "integer" and grid.bits != SMALL_FLOATS[grid.levels].bits:
            raise ValueError
        if type(grid.block_rows) is not int or grid.block_rows < 1:
            raise ValueError
        if not 2 <= grid.bits <= 8 or grid.group_size < -1 or min(full_shape) < 1:
            raise ValueError
        if mirrored and (grid.narrow_range or not grid.sym):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"module {module!r}: its entry in the metadata is damaged") from error
    shape = (full_shape[0], prod(full_shape[1:]))
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


FORMAT = Format(
    name="ptq",
    help="Native: any bits 2 to 8, any group size, any width, small floats.",
    misfit=lambda layer: None,
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
