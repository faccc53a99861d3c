"""ggml's blocks (types.py says how they lie) as rounded weights, read apart from how pack.py writes
them. What `ggml_validate_row_data` refuses, llama.cpp's check of a file, is refused here too."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array, Codes
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats.gguf.types import Bits, BlockType

_NAN_E8M0, _NAN_E4M3, _SIGN = 0xFF, 0x7F, 0x80
_SMALL = {"e8m0": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn}


def unpack(kind: BlockType, name: str, packed: NDArray[np.uint8]) -> QuantizedWeight:
    """The weight that blocks hold, on the type's grid: codes as they are stored, scales (and
    offsets) one a group.

    name: the tensor's
    packed: uint8 [out_features, blocks · nbytes]

    Raises:
        InputError: a scale or an offset of a block is not finite.
    """
    rows = len(packed)
    blocks = np.ascontiguousarray(packed).view(kind.parts)
    codes = np.zeros((*blocks.shape, kind.block), np.uint8)
    for place in kind.codes:
        _add(codes, place, blocks)
    if kind.name == "Q8_0":
        codes += np.uint8(128)
    floats = {
        part: _floats(kind, name, part, blocks)
        for part in ("d", "m", "dmin")
        if part in blocks.dtype.fields
    }
    scales, offsets = floats["d"], floats.get("m")
    if kind.grid.multiples is not None:
        scales, offsets = _multiples(kind, blocks)
    zero = kind.grid.mid_code if kind.grid.integers and kind.grid.sym else 0
    return QuantizedWeight(
        codes=codes.reshape(rows, -1) if rows else codes.reshape(0, blocks.shape[1] * kind.block),
        scales=scales,
        zeros=np.full(scales.shape, zero, np.uint8),
        grid=kind.grid,
        offsets=offsets,
        super_scales=None if kind.grid.multiples is None else floats["d"],
        super_offsets=floats.get("dmin"),
    )


def _add(numbers: Codes, place: Bits, blocks: NDArray[np.void]) -> None:
    """Add to each number, uint8 [rows, blocks, numbers], the bits of it that a part holds."""
    stored = blocks[place.part]
    mask, own_bytes = np.uint8(2**place.bits - 1), place.run * place.bits // 8
    runs = stored.reshape(*blocks.shape, -1, own_bytes)
    for nth in range(8 // place.bits):
        values = (runs >> np.uint8(nth * place.bits) & mask) << np.uint8(place.shift)
        first = nth * own_bytes
        into = numbers.reshape(*runs.shape[:-1], place.run)
        into[..., first : first + own_bytes] += values


def _floats(kind: BlockType, name: str, part: str, blocks: NDArray[np.void]) -> Array:
    """The floats of a part, [rows, one or more a block]. Raises InputError for what is none."""
    stored, dtype = blocks[part], kind.grid.scale_dtype
    if dtype == "e8m0":
        bad = stored == _NAN_E8M0
    elif dtype == "e4m3":
        bad = stored > _SIGN
        stored = np.where(stored == _NAN_E4M3, np.uint8(0), stored)  # so does llama.cpp read it
    else:
        bad = ~np.isfinite(stored)
    if bad.any():
        row, block = (int(index) for index in np.argwhere(bad)[0][:2])
        said = "255" if dtype == "e8m0" else "below 0" if dtype == "e4m3" else stored[row, block]
        raise InputError(f"tensor {name!r}: {part} of block {block} in row {row} is {said}")
    values = np.array(stored).reshape(len(blocks), -1)
    return values.view(_SMALL[dtype]) if dtype in _SMALL else values.astype(np.float16)


def _multiples(kind: BlockType, blocks: NDArray[np.void]) -> tuple[Array, Array | None]:
    """Multiples of the scale and of the minimum, [rows, groups]; None where there is no minimum."""
    groups = kind.block // kind.grid.group_size
    count = groups * (2 if kind.grid.own_offsets else 1)
    numbers = np.zeros((*blocks.shape, count), np.uint8)
    if not kind.multiples:
        numbers = _from_six_bits(blocks["scales"])
    for place in kind.multiples:
        _add(numbers, place, blocks)
    shape = (len(blocks), blocks.shape[1] * groups)
    if kind.grid.own_offsets:
        scales, mins = numbers[..., :groups], numbers[..., groups:]
        return scales.reshape(shape), mins.reshape(shape)
    signed = numbers.view(np.int8).reshape(shape)
    return signed - np.int8(32) if kind.grid.scale_dtype == "int6" else signed, None


def _from_six_bits(twelve: Codes) -> Codes:
    """The eight scales, then the eight minima, of a block's 12 bytes."""
    result = np.empty((*twelve.shape[:-1], 16), np.uint8)
    for group in range(4):
        for first, low in ((0, twelve[..., 8 + group] % 16), (8, twelve[..., 8 + group] // 16)):
            whole = twelve[..., first // 2 + group]
            result[..., first + group] = whole % 64
            result[..., first + group + 4] = low + whole // 64 * 16
    return result
