"""GGUF's legacy quantized blocks: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

A row is cut into blocks of 32 columns; a block is, little endian and back to back:

    type  bytes  parts                                value of column j
    Q4_0  18     d F16, qs U8 [16]                    (code − 8) · d
    Q4_1  20     d F16, m F16, qs U8 [16]             code · d + m
    Q5_0  22     d F16, qh U32, qs U8 [16]            (code − 16) · d
    Q5_1  24     d F16, m F16, qh U32, qs U8 [16]     code · d + m
    Q8_0  34     d F16, qs I8 [32]                    (code − 128) · d, codes − 128 stored

Column j < 16 has the low nibble of qs[j], column j + 16 the high one; qh has the fifth bits, column
j in bit j. d is a scale and m `−zero · scale` rounded to F16, so Q4_0, Q5_0 and Q8_0 take symmetric
grids, Q4_1 and Q5_1 the others. A mirrored group of a symmetric grid is `max − code` with a
negative d, as llama.cpp's own quantizer has them. Wider groups repeat their scale in every block.

`encode` makes the data of one linear, U8 [out_features, blocks · bytes], under its name in the
checkpoint; metadata.py makes the file's metadata. GGUF's names stand with the families
(models/gguf_names.py), writing the file is storage's work. The key `ptq` says what blocks cannot:

    {"<module>": {"group_size": 128, "method": "gptq"}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common

BLOCK = 32
_LIMITS = common.Limits(
    bits=(4, 5, 8), short_group=True, whole_tensor=True, embeddings=True, transposed=True
)


@dataclass(frozen=True)
class BlockType:
    """A type of block, by ggml's name. `sym`: code 2^(bits−1) is zero, no minimum is stored."""

    name: str
    bits: int
    sym: bool

    @property
    def parts(self) -> np.dtype[Any]:
        """A block as a structure."""
        fields: list[Any] = [("d", "<f2")]
        fields += [] if self.sym else [("m", "<f2")]
        fields += [("qh", "<u4")] if self.bits == 5 else []
        fields += [("qs", "i1", (32,)) if self.bits == 8 else ("qs", "u1", (16,))]
        return np.dtype(fields)


TYPES = (
    BlockType("Q4_0", 4, True),
    BlockType("Q4_1", 4, False),
    BlockType("Q5_0", 5, True),
    BlockType("Q5_1", 5, False),
    BlockType("Q8_0", 8, True),
)


def block_type(grid: Grid) -> BlockType:
    """The type that holds a grid. Raises InputError where none does."""
    for kind in TYPES:
        if (kind.bits, kind.sym) == (grid.bits, grid.sym):
            return kind
    raise InputError(f"gguf has no type for {grid.bits} bits, sym {grid.sym}")


def _misfit(layer: Layer) -> Misfit | None:
    grid, columns = layer.grid, layer.shape[1]
    if found := common.misfit(layer, "gguf", _LIMITS):
        return found
    if grid.bits == 8 and not grid.sym:
        return Misfit("gguf has no asymmetric type of 8 bits", "--sym")
    if columns % BLOCK:
        return Misfit(f"gguf holds in_features in multiples of {BLOCK}, not {columns}")
    if grid.width(columns) % BLOCK:
        reason = f"gguf has blocks of {BLOCK} columns, not {grid.width(columns)}"
        return Misfit(reason, f"--group-size {BLOCK}")
    return None


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    rows, columns = layer.shape
    width = columns // BLOCK * block_type(layer.grid).parts.itemsize
    return (TensorSpec(f"{layer.module}.weight", "U8", (rows, width)),)


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    kind, (rows, columns) = block_type(layer.grid), layer.shape
    if kind.sym:
        rounded = common.signed_scales(layer, rounded)
        values = [rounded.scales]
    else:
        values = [rounded.scales, common.offsets(layer, rounded)]
    group, blocks = _group_of_block(layer), rounded.codes.reshape(-1, BLOCK)
    parts = []
    for own in values:
        wide = np.broadcast_to(own, (rows, layer.grid.n_groups(columns)))[:, group]
        parts.append(np.ascontiguousarray(wide, "<f2").reshape(-1, 1).view(np.uint8))
    if kind.bits == 5:
        parts.append(np.packbits(blocks >> 4, axis=-1, bitorder="little"))
    if kind.bits == 8:
        parts.append(blocks ^ np.uint8(128))
    else:
        low, high = blocks[:, :16] & np.uint8(15), blocks[:, 16:] & np.uint8(15)
        parts.append(low | high << np.uint8(4))
    return {f"{layer.module}.weight": np.concatenate(parts, axis=-1).reshape(rows, -1)}


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    kind, grid = block_type(layer.grid), layer.grid
    blocks = np.ascontiguousarray(tensors[f"{layer.module}.weight"]).view(kind.parts)
    codes = np.empty((*blocks.shape, BLOCK), np.uint8)
    if kind.bits == 8:
        codes[...] = blocks["qs"].astype(np.int16) + 128
    else:
        codes[..., :16] = blocks["qs"] % 16
        codes[..., 16:] = blocks["qs"] // 16
    if kind.bits == 5:
        for column in range(BLOCK):
            codes[..., column] += ((blocks["qh"] >> np.uint32(column)) % 2 * 16).astype(np.uint8)
    scales = _of_groups(layer, blocks["d"])
    zeros, offsets = np.full(scales.shape, grid.mid_code, np.uint8), None
    if not kind.sym:
        zeros, offsets = common.from_offsets(scales, _of_groups(layer, blocks["m"]), grid)
    codes = codes.reshape(layer.shape)
    return common.positive_scales(QuantizedWeight(codes, scales, zeros, grid, offsets=offsets))


def _group_of_block(layer: Layer) -> NDArray[np.int32]:
    return layer.grid.g_idx(layer.shape[1])[::BLOCK]


def _of_groups(layer: Layer, values: Array) -> Array:
    """The value of each group, from those of its blocks. Raises InputError where they differ."""
    group = _group_of_block(layer)
    if layer.grid.group_size == 0:
        own = values[:1, :1].astype(np.float16)
    else:
        own = values[:, np.flatnonzero(np.diff(group, prepend=-1))].astype(np.float16, order="C")
    if not np.array_equal(np.broadcast_to(own, (len(values), own.shape[1]))[:, group], values):
        raise InputError(f"{layer.module}: the blocks of a group have different scales or minima")
    return own


def permute_rows(rows: Array, heads: int) -> Array:
    """Checkpoint order to GGUF's: in each head, row i of the first half goes before row i of the
    second. Rows may be packed ones: [out_features, …]."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def unpermute_rows(rows: Array, heads: int) -> Array:
    """GGUF's order to the checkpoint's: even rows of a head, then odd ones."""
    own = rows.reshape(heads, len(rows) // heads, *rows.shape[1:])
    result = own.copy()
    half = own.shape[1] // 2
    result[:, :half], result[:, half:] = own[:, ::2], own[:, 1::2]
    return result.reshape(rows.shape)


def _layers(contents: Contents) -> tuple[Layer, ...]:
    """Layers of a GGUF file: `metadata` are its key-values, `specs` its tensors by their names in a
    checkpoint; each spec has GGUF's name, ggml's type as the dtype and the shape as
    [out_features, in_features]."""
    metadata = contents.metadata
    if metadata.get("general.architecture") is None:
        return ()
    known = {kind.name: kind for kind in TYPES}
    layers = []
    for name, spec in contents.specs.items():
        if spec.dtype in FLOAT_DTYPES:
            continue
        kind, module, own = known.get(spec.dtype), name.rpartition(".")[0], spec.name
        if kind is None:
            raise InputError(f"tensor {own!r} is of type {spec.dtype}, which is not understood")
        if len(spec.shape) != 2 or spec.shape[1] % BLOCK:
            raise InputError(f"tensor {own!r} of type {spec.dtype} has shape {list(spec.shape)}")
        shape = (spec.shape[0], spec.shape[1])
        entry = common.mapping(common.mapping(metadata, "ptq", "metadata"), module, "key ptq")
        size = common.setting(entry, "group_size", int, f"key ptq, {module}", BLOCK)
        if size != -1 and (size < 0 or size % BLOCK):
            raise InputError(f"key ptq, {module}: group_size {size} is no multiple of {BLOCK}")
        grid = Grid(kind.bits, size, kind.sym, scale_dtype="float16")
        method = str(entry.get("method", ""))
        layer = Layer(module, f"{module}.weight", shape, shape, "F16", grid, method=method)
        layers.append(common.perhaps_mirrored(layer))
    return tuple(layers)


def _metadata(layers: Sequence[Layer]) -> dict[str, Any]:
    return {
        layer.module: {"group_size": layer.grid.group_size, "method": layer.method}
        for layer in layers
    }


FORMAT = Format(
    name="gguf",
    help="GGUF Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: llama.cpp, transformers.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    metadata=_metadata,
    layers=_layers,
    mirrored=common.may_mirror,
    container="gguf",
)
