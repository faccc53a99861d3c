"""ONNX Runtime's MatMulNBits (domain com.microsoft): inputs of the node for each linear.

Per linear `<module>`, with out_features N, in_features K, n_blocks = ceil(K / group_size):

    <module>.MatMul.qweight  U8 [N, n_blocks, group_size · bits / 8]  B: codes, lowest bits first;
                                                                      a short last block is padded
    <module>.MatMul.scales   F32 or F16 [N, n_blocks]
    <module>.MatMul.qzeros   U8 [N, ceil(n_blocks · bits / 8)]        zeros of a row, lowest bits
                                                                      first, the last byte filled
                                                                      up with 2^(bits−1);
                                                                      asymmetric grids only

`weight ≈ scales · (codes − zeros)`, a missing zero is 2^(bits−1), and the node computes
`A @ weightᵀ`. A mirrored group of a symmetric grid is `max − code` with a negative scale, as ONNX
Runtime's own quantizer writes them. bits are 2, 4 or 8, groups 16, 32, 64, 128 or 256. The node's
attributes are the metadata, which a reader of graphs hands over, one entry per module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.numerics.packing import pack, pack_groups, packed_width, unpack, unpack_groups
from ptq_cli.numerics.scales import SCALE_DTYPES

_LIMITS = common.Limits(
    bits=(2, 4, 8),
    scale_dtypes=("float32", "float16", "bfloat16"),
    group_sizes=(16, 32, 64, 128, 256),
    whole_row=False,
    short_group=True,
)


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    grid, (rows, columns) = layer.grid, layer.shape
    blocks = grid.n_groups(columns)
    word = "F16" if grid.scale_dtype == "float16" else "F32"
    name = f"{layer.module}.MatMul"
    packed = (rows, blocks, grid.group_size * grid.bits // 8)
    specs = [
        TensorSpec(f"{name}.qweight", "U8", packed),
        TensorSpec(f"{name}.scales", word, (rows, blocks)),
    ]
    if not grid.sym:
        specs.append(TensorSpec(f"{name}.qzeros", "U8", (rows, packed_width(blocks, grid.bits))))
    return tuple(specs)


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    grid, (rows, blocks) = layer.grid, rounded.scales.shape
    rounded = common.signed_scales(layer, rounded)
    name = f"{layer.module}.MatMul"
    codes = pack_groups(rounded.codes, grid.bits, grid.group_size)
    stored = np.float16 if grid.scale_dtype == "float16" else np.float32
    tensors: dict[str, Array] = {
        f"{name}.qweight": codes.reshape(rows, blocks, -1),
        f"{name}.scales": rounded.scales.astype(stored),
    }
    if not grid.sym:
        per_byte = 8 // grid.bits
        full = np.full((rows, -(-blocks // per_byte) * per_byte), grid.mid_code, np.uint8)
        full[:, :blocks] = rounded.zeros
        tensors[f"{name}.qzeros"] = pack(full, grid.bits)
    return tensors


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    grid, (rows, columns) = layer.grid, layer.shape
    name, shape = f"{layer.module}.MatMul", grid.scales_shape(layer.shape)
    packed = tensors[f"{name}.qweight"].reshape(rows, -1)
    zeros = np.full(shape, grid.mid_code, np.uint8)
    if not grid.sym:
        zeros = np.ascontiguousarray(unpack(tensors[f"{name}.qzeros"], grid.bits, shape[1]))
    return common.positive_scales(
        QuantizedWeight(
            codes=unpack_groups(packed, grid.bits, grid.group_size, columns),
            scales=tensors[f"{name}.scales"].reshape(shape).astype(SCALE_DTYPES[grid.scale_dtype]),
            zeros=zeros,
            grid=grid,
        )
    )


def _layers(contents: Contents) -> tuple[Layer, ...]:
    specs = contents.specs
    modules = common.modules_with(specs, ".MatMul.qweight")
    return tuple(_layer(module, contents.metadata.get(module), specs) for module in modules)


def _layer(module: str, node: Any, specs: Mapping[str, TensorSpec]) -> Layer:
    if not isinstance(node, Mapping):
        raise InputError(f"module {module!r}: its MatMulNBits node is missing")
    where, name = f"MatMulNBits of {module}", f"{module}.MatMul"
    scales = common.tensor(specs, f"{name}.scales", 2)
    grid = Grid(
        bits=common.setting(node, "bits", int, where, 4),
        group_size=common.setting(node, "block_size", int, where),
        sym=f"{name}.qzeros" not in specs,
        scale_dtype=common.scale_name(scales),
    )
    if grid.bits not in _LIMITS.bits or grid.group_size not in (_LIMITS.group_sizes or ()):
        raise InputError(f"{where}: {grid.bits} bits in blocks of {grid.group_size}")
    shape = (common.setting(node, "N", int, where), common.setting(node, "K", int, where))
    dtype = common.SCALE_WORDS[grid.scale_dtype]
    layer = common.perhaps_mirrored(Layer(module, f"{module}.weight", shape, shape, dtype, grid))
    common.check_specs(specs, _specs(layer), where)
    return layer


def _metadata(layers: Sequence[Layer]) -> dict[str, Any]:
    """The attributes of each layer's MatMulNBits node; accuracy_level 0 computes in float32."""
    return {
        layer.module: {
            "K": layer.shape[1],
            "N": layer.shape[0],
            "bits": layer.grid.bits,
            "block_size": layer.grid.group_size,
            "accuracy_level": 0,
        }
        for layer in layers
    }


FORMAT = Format(
    name="onnx",
    help="MatMulNBits nodes, 2, 4, 8 bits: ONNX Runtime.",
    misfit=lambda layer: common.misfit(layer, "onnx", _LIMITS),
    specs=_specs,
    encode=_encode,
    decode=_decode,
    metadata=_metadata,
    layers=_layers,
    mirrored=common.may_mirror,
    scale_dtype=lambda model: "float16" if model == "F16" else "float32",
    container="onnx",
)
