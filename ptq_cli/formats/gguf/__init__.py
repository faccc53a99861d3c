"""GGUF's quantized tensors: every type of blocks of types.py, from Q4_0 to Q6_K, IQ4_XS and NVFP4.

types.py has the table of the types and the grid that each is. Of those whose scales are float16,
groups may be wider than a block, which repeats their scale. A mirrored group of a symmetric integer
grid is `max − code` with a negative d, as llama.cpp's own quantizer has them; m of Q4_1 and Q5_1 is
a group's own offset, or `−zero · scale` rounded to float16.

`encode` makes the data of one linear, U8 [out_features, blocks · bytes], under its name in the
checkpoint; metadata.py makes the file's metadata. GGUF's names stand with the families
(models/gguf_names.py), writing the file is storage's work. The key `ptq` says what blocks cannot:

    {"<module>": {"group_size": 128, "method": "gptq"}}

and `own_offsets: true` where m is no multiple of d by intent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import MULTIPLES, Grid
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.formats.gguf.pack import pack
from ptq_cli.formats.gguf.types import TYPES, BlockType
from ptq_cli.formats.gguf.unpack import check_blocks, unpack

BLOCK = 32  # columns, of the types whose scales are float16
_LIMITS = common.Limits(
    bits=(4, 5, 8), short_group=True, whole_tensor=True, embeddings=True, own_offsets=True,
    transposed=True,
)  # fmt: skip
_OTHERS = replace(  # what is more than integers with a float16
    _LIMITS,
    bits=(2, 3, 4, 5, 6),
    scale_dtypes=("float16", "e8m0", "e4m3", *MULTIPLES),
    levels=("integer", "e2m1", "iq4_nl"),
)


def block_type(grid: Grid) -> BlockType:
    """The type that holds a grid. Raises InputError where none does."""
    for kind in TYPES.values():
        if _numbers(kind.grid) == _numbers(grid):
            return kind
    raise InputError(f"gguf has no type for {_said(grid)}")


def _numbers(grid: Grid) -> tuple[object, ...]:
    """What tells types apart. Where scales are floats it is not the size of groups, nor whether
    offsets are their own."""
    same = (grid.bits, grid.levels, grid.sym)
    if grid.scale_dtype in common.SCALE_WORDS:
        return same
    return *same, grid.scale_dtype, grid.group_size, grid.own_offsets


def _said(grid: Grid) -> str:
    if not grid.integers or grid.multiples:
        return f"{grid.bits} bits, {grid.levels}, groups of {grid.group_size}, {grid.scale_dtype}"
    return f"{grid.bits} bits, sym {grid.sym}"


def _misfit(layer: Layer) -> Misfit | None:
    grid, columns = layer.grid, layer.shape[1]
    flat = grid.integers and not grid.multiples
    if found := common.misfit(layer, "gguf", _LIMITS if flat else _OTHERS):
        return found
    if flat and grid.bits == 8 and not grid.sym:
        return Misfit("gguf has no asymmetric type of 8 bits", "--sym")
    try:
        kind = block_type(grid)
    except InputError as error:
        return Misfit(error.message)
    if columns % kind.block:
        holder = "gguf" if flat else kind.name
        return Misfit(f"{holder} holds in_features in multiples of {kind.block}, not {columns}")
    if _repeats(kind) and grid.width(columns) % BLOCK:
        reason = f"gguf has blocks of {BLOCK} columns, not {grid.width(columns)}"
        return Misfit(reason, f"--group-size {BLOCK}")
    return None


def _repeats(kind: BlockType) -> bool:
    """Whether groups may be wider than a block, which then repeats their scale."""
    return kind.grid.scale_dtype == "float16"


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    (rows, columns), kind = layer.shape, block_type(layer.grid)
    width = columns // kind.block * kind.nbytes
    return (TensorSpec(f"{layer.module}.weight", "U8", (rows, width)),)


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    kind = block_type(layer.grid)
    if rounded.grid.global_scale != 1:
        raise InputError(
            f"{layer.module}: gguf has no global scale of NVFP4 here, and this weight has one",
            hint="quantize the float model with --format gguf, or --format compressed-tensors",
        )
    if _repeats(kind):
        rounded = _by_block(layer, kind, rounded)
    return {f"{layer.module}.weight": pack(kind, rounded)}


def _by_block(layer: Layer, kind: BlockType, rounded: QuantizedWeight) -> QuantizedWeight:
    """The weight with the scales and offsets of each block, as they are stored."""
    if kind.grid.integers and kind.grid.sym:
        rounded = common.signed_scales(layer, rounded)
    (rows, columns), group = layer.shape, _group_of_block(layer)

    def wide(own: Array) -> NDArray[np.float16]:
        every = np.broadcast_to(own, (rows, layer.grid.n_groups(columns)))
        return every[:, group].astype(np.float16)

    offsets = wide(common.offsets(layer, rounded)) if kind.grid.own_offsets else None
    return replace(rounded, scales=wide(rounded.scales), offsets=offsets)


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    kind, grid, name = block_type(layer.grid), layer.grid, f"{layer.module}.weight"
    check_blocks(kind, name, tensors[name])
    stored = unpack(kind, tensors[name])
    if not _repeats(kind):
        return replace(stored, grid=grid)
    scales, offsets = _of_groups(layer, stored.scales), None
    zeros = _of_groups(layer, stored.zeros)
    if stored.offsets is not None:
        offsets = _of_groups(layer, stored.offsets)
        if not grid.own_offsets:
            zeros, offsets = common.from_offsets(scales, offsets, grid)
    return common.positive_scales(
        replace(stored, scales=scales, zeros=zeros, offsets=offsets, grid=grid)
    )


def _by_rows(layer: Layer) -> bool:
    """Offsets of zeros are rounded: only the whole weight tells whether they say the same."""
    grid = layer.grid
    return grid.by_rows and (grid.sym or grid.own_offsets)


def _group_of_block(layer: Layer) -> NDArray[np.int32]:
    return layer.grid.g_idx(layer.shape[1])[::BLOCK]


def _of_groups(layer: Layer, values: Array) -> Array:
    """The value of each group, from those of its blocks. Raises InputError where they differ."""
    group = _group_of_block(layer)
    if layer.grid.group_size == 0:
        own = values[:1, :1].copy()
    else:
        own = np.ascontiguousarray(values[:, np.flatnonzero(np.diff(group, prepend=-1))])
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
    layers = []
    for name, spec in contents.specs.items():
        if spec.dtype in FLOAT_DTYPES:
            continue
        kind, module, own = TYPES.get(spec.dtype), name.rpartition(".")[0], spec.name
        if kind is None:
            raise InputError(f"tensor {own!r} is of type {spec.dtype}, which is not understood")
        if len(spec.shape) != 2 or spec.shape[1] % kind.block:
            raise InputError(f"tensor {own!r} of type {spec.dtype} has shape {list(spec.shape)}")
        shape = (spec.shape[0], spec.shape[1])
        entry = common.mapping(common.mapping(metadata, "ptq", "metadata"), module, "key ptq")
        grid = _grid(kind, entry, f"key ptq, {module}")
        method = str(entry.get("method", ""))
        layer = Layer(module, f"{module}.weight", shape, shape, "F16", grid, method=method)
        layers.append(common.perhaps_mirrored(layer))
    return tuple(layers)


def _grid(kind: BlockType, entry: Mapping[str, Any], where: str) -> Grid:
    """The grid of a tensor of that type. Raises InputError where the key `ptq` says another."""
    size = common.setting(entry, "group_size", int, where, kind.grid.group_size)
    if not _repeats(kind):
        if size != kind.grid.group_size:
            raise InputError(f"{where}: group_size {size} is not {kind.name}'s")
        return kind.grid
    if size != -1 and (size < 0 or size % BLOCK):
        raise InputError(f"{where}: group_size {size} is no multiple of {BLOCK}")
    own = kind.grid.own_offsets and common.setting(entry, "own_offsets", bool, where, False)
    return replace(kind.grid, group_size=size, own_offsets=own)


def _metadata(layers: Sequence[Layer]) -> dict[str, Any]:
    return {
        layer.module: {"group_size": layer.grid.group_size, "method": layer.method}
        | ({"own_offsets": True} if layer.grid.own_offsets else {})
        for layer in layers
    }


FORMAT = Format(
    name="gguf",
    help="GGUF: Q4_0 to Q8_0, K-quants, IQ4, MXFP4, NVFP4: llama.cpp, transformers.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    metadata=_metadata,
    layers=_layers,
    by_rows=_by_rows,
    global_scale=False,
    mirrored=common.may_mirror,
    container="gguf",
    type_of=lambda layer: block_type(layer.grid).name,
)
