"""ggml's blocks (types.py says how they lie) as rounded weights, read apart from how pack.py writes
them."""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array, Codes
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats.gguf.types import Bits, BlockType

_FLOATS = ("d", "m", "dmin")
_SMALL: dict[str, Any] = {"e8m0": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn}
_NAN_E8M0, _NAN_E4M3, _SIGN = 0xFF, 0x7F, 0x80


def check_blocks(kind: BlockType, name: str, packed: NDArray[np.uint8]) -> None:
    """Refuse what `ggml_validate_row_data` refuses, llama.cpp's own check: a float that is not
    finite; and a scale of NVFP4 that has a sign.

    name: the tensor's; packed: its rows, uint8 [out_features, blocks · nbytes]

    Raises:
        InputError: with the first such block.
    """
    blocks = np.ascontiguousarray(packed).view(kind.parts)
    for part in _floats_of(kind):
        stored, dtype = blocks[part], kind.grid.scale_dtype
        if dtype == "e8m0":
            bad = stored == _NAN_E8M0
        elif dtype == "e4m3":
            bad = stored > _SIGN
        else:
            bad = ~np.isfinite(stored)
        if bad.any():
            row, block, *nth = np.argwhere(bad)[0]
            value = stored[row, block][tuple(nth)]
            said = f"the byte {value:#x}" if dtype in _SMALL else f"{value}"
            raise InputError(
                f"tensor {name!r}: {part} of block {block} of row {row} is {said}, no finite"
                f" {'number above 0' if dtype in _SMALL else 'number'}"
            )


def unpack(kind: BlockType, packed: NDArray[np.uint8]) -> QuantizedWeight:
    """The weight that blocks hold, on the type's grid: codes and floats as they are stored.

    packed: uint8 [out_features, blocks · nbytes]
    """
    blocks = np.ascontiguousarray(packed).view(kind.parts)
    codes = np.zeros((*blocks.shape, kind.block), np.uint8)
    for place in kind.codes:
        _add(codes, place, blocks)
    if kind.name == "Q8_0":
        codes += np.uint8(128)
    floats = {part: _floats(kind, blocks[part]) for part in _floats_of(kind)}
    scales, offsets, d = floats["d"], floats.get("m"), None
    if kind.grid.multiples is not None:
        d, (scales, offsets) = scales, _multiples(kind, blocks)
    zero = kind.grid.mid_code if kind.grid.integers and kind.grid.sym else 0
    return QuantizedWeight(
        codes=codes.reshape(len(blocks), blocks.shape[1] * kind.block),
        scales=scales,
        zeros=np.full(scales.shape, zero, np.uint8),
        grid=kind.grid,
        offsets=offsets,
        super_scales=d,
        super_offsets=floats.get("dmin"),
    )


def _add(numbers: Codes, place: Bits, blocks: NDArray[np.void]) -> None:
    """Add to each number, uint8 [rows, blocks, numbers], the bits of it that a part holds."""
    mask, n = np.uint8(2**place.bits - 1), place.run * place.bits // 8
    runs = numbers.reshape(*blocks.shape, numbers.shape[-1] // place.run, place.run)
    stored = blocks[place.part].reshape(*runs.shape[:3], n)
    for nth in range(8 // place.bits):
        values = (stored >> np.uint8(nth * place.bits) & mask) << np.uint8(place.shift)
        runs[..., nth * n : (nth + 1) * n] += values


def _floats_of(kind: BlockType) -> list[str]:
    """The parts that are floats."""
    return [part for part, _, _ in kind.layout if part in _FLOATS]


def _floats(kind: BlockType, stored: Array) -> Array:
    """Floats [rows, blocks · those of a block]."""
    dtype = kind.grid.scale_dtype
    if dtype == "e4m3":  # as llama.cpp reads what is no number
        stored = np.where(stored == _NAN_E4M3, np.uint8(0), stored)
    values = np.ascontiguousarray(stored).reshape(len(stored), prod(stored.shape[1:]))
    return values.view(_SMALL[dtype]) if dtype in _SMALL else values.astype(np.float16, copy=False)


def _multiples(kind: BlockType, blocks: NDArray[np.void]) -> tuple[Array, Array | None]:
    """Multiples of the scale and of the minimum, [rows, groups]; None where there is no minimum."""
    groups = kind.block // kind.grid.group_size
    shape = (len(blocks), blocks.shape[1] * groups)
    if not kind.multiples:
        numbers = _from_six_bits(blocks["scales"])
    else:
        count = groups * (2 if kind.grid.own_offsets else 1)
        numbers = np.zeros((*blocks.shape, count), np.uint8)
        for place in kind.multiples:
            _add(numbers, place, blocks)
    if kind.grid.own_offsets:
        scales, mins = numbers[..., :groups], numbers[..., groups:]
        return scales.reshape(shape), mins.reshape(shape)
    signed = numbers.view(np.int8).reshape(shape)
    return signed - np.int8(32) if kind.grid.scale_dtype == "int6" else signed, None


def _from_six_bits(twelve: Codes) -> Codes:
    """The eight scales, then the eight minima, of a block's 12 bytes."""
    result = np.empty((*twelve.shape[:-1], 16), np.uint8)
    for group in range(4):
        low = twelve[..., 8 + group]
        for first, own in ((0, low % 16), (8, low // 16)):
            whole = twelve[..., first // 2 + group]
            result[..., first + group] = whole % 64
            result[..., first + group + 4] = own + whole // 64 * 16
    return result
