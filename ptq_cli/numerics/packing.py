"""Codes as bits: least significant bit first, code i in bits [i·b, i·b + b) of one long
little-endian number.

`pack` writes bits; `unpack` cuts codes out of bytes. They are written apart on purpose: every
output is unpacked and compared before it gets its name, and that proves nothing if both ways share
a mistake. At 4 bits a byte is `low | high << 4`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Codes
from ptq_cli.numerics.parallel import pieces

_ROWS_AT_ONCE = 1 << 22  # codes unpacked to single bits at a time: eight bytes each
_WORDS_AT_ONCE = 1 << 16  # words of whole bytes' codes: they stay in the cache


def packed_width(columns: int, bits: int) -> int:
    """Bytes that hold `columns` codes."""
    return -(-columns * bits // 8)


def pack(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """Pack each row of codes, uint8 [rows, columns] → uint8 [rows, ceil(columns · bits / 8)]."""
    rows, columns = codes.shape
    if bits == 8:
        return codes.copy()
    if bits in (2, 4) and columns % (8 // bits) == 0:
        return _pack_whole_bytes(codes, bits)
    packed = np.empty((rows, packed_width(columns, bits)), np.uint8)
    for strip in pieces(0, rows, columns, _ROWS_AT_ONCE):
        part = codes[strip]
        single = np.unpackbits(part[..., None], axis=-1, count=bits, bitorder="little")
        stream = single.reshape(len(part), columns * bits)
        packed[strip] = np.packbits(stream, axis=-1, bitorder="little")
    return packed


def _pack_whole_bytes(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """Two or four codes are one little-endian word, whose bytes are moved together."""
    per_byte = 8 // bits
    word = np.dtype(f"<u{per_byte}")
    packed = np.empty((codes.shape[0], codes.shape[1] // per_byte), np.uint8)
    words, out = np.ascontiguousarray(codes).reshape(-1).view(word), packed.reshape(-1)
    room = np.empty(min(len(words), _WORDS_AT_ONCE), word)
    for start in range(0, len(words), _WORDS_AT_ONCE):
        part = words[start : start + _WORDS_AT_ONCE]
        moved = np.right_shift(part, word.type(8 - bits), out=room[: len(part)])
        moved |= part
        for place in range(2, per_byte):
            moved |= part >> word.type(place * (8 - bits))
        np.copyto(out[start : start + _WORDS_AT_ONCE], moved, casting="unsafe")
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, columns: int) -> Codes:
    """Unpack rows packed by `pack`: uint8 [rows, bytes] → codes uint8 [rows, columns].

    The layout repeats every 8 codes, which fill `bits` bytes exactly: each of the 8 places is cut
    out of its byte, and of the next one where it straddles, for all periods at once.
    """
    if bits == 4 and columns == 2 * packed.shape[1]:
        return _unpack_nibbles(packed)
    rows, periods, width = packed.shape[0], -(-columns // 8), packed_width(columns, bits)
    cycles = np.zeros((rows, periods * bits), np.uint8)
    cycles[:, :width] = packed[:, :width]
    codes = np.empty((rows, periods * 8), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        cut = cycles[:, byte::bits] >> np.uint8(shift)
        if shift + bits > 8:
            cut |= cycles[:, byte + 1 :: bits] << np.uint8(8 - shift)
        codes[:, place::8] = cut & np.uint8(2**bits - 1)
    return np.ascontiguousarray(codes[:, :columns])


def _unpack_nibbles(packed: NDArray[np.uint8]) -> Codes:
    """Every byte spread over a word of two: `x | x << 4`, of which each byte's low half is kept."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    flat, words = np.ascontiguousarray(packed).reshape(-1), codes.reshape(-1).view("<u2")
    room = np.empty(min(len(flat), _WORDS_AT_ONCE), np.uint16)
    for start in range(0, len(flat), _WORDS_AT_ONCE):
        part = flat[start : start + _WORDS_AT_ONCE]
        spread = room[: len(part)]
        np.copyto(spread, part)
        moved = np.left_shift(spread, 4, out=words[start : start + _WORDS_AT_ONCE])
        moved |= spread
        moved &= np.uint16(0x0F0F)
    return codes


def pack_groups(codes: Codes, bits: int, width: int) -> NDArray[np.uint8]:
    """Pack rows so that every group of `width` columns starts on a byte; a short last group takes
    the bytes of a full one: uint8 [rows, n_groups · ceil(width · bits / 8)]."""
    rows, columns = codes.shape
    n_groups = max(1, -(-columns // width))
    if columns < n_groups * width:
        padded = np.zeros((rows, n_groups * width), np.uint8)
        padded[:, :columns] = codes
        codes = padded
    packed = pack(np.ascontiguousarray(codes).reshape(rows * n_groups, width), bits)
    return packed.reshape(rows, n_groups * packed_width(width, bits))


def unpack_groups(packed: NDArray[np.uint8], bits: int, width: int, columns: int) -> Codes:
    """The inverse of `pack_groups`; padding is cut off: uint8 [rows, columns]."""
    rows, n_groups = packed.shape[0], max(1, -(-columns // width))
    codes = unpack(packed.reshape(rows * n_groups, packed_width(width, bits)), bits, width)
    return np.ascontiguousarray(codes.reshape(rows, n_groups * width)[:, :columns])


def words_width(columns: int, bits: int) -> int:
    """32-bit words that hold `columns` codes."""
    return -(-columns * bits // 32)


def pack_words(codes: Codes, bits: int) -> NDArray[np.uint32]:
    """Pack each row of codes into little-endian 32-bit words, uint8 [rows, columns] → uint32
    [rows, ceil(columns · bits / 32)]; bits after the last code are 0. At widths that don't divide
    32, codes straddle words."""
    rows, columns = codes.shape
    n_bytes = 4 * words_width(columns, bits)
    packed = pack(codes, bits)
    if packed.shape[1] < n_bytes:
        padded = np.zeros((rows, n_bytes), np.uint8)
        padded[:, : packed.shape[1]] = packed
        packed = padded
    return packed.view("<u4").astype(np.uint32, copy=False)


def unpack_words(words: NDArray[np.uint32], bits: int, columns: int) -> Codes:
    """Unpack rows packed by `pack_words`: uint32 [rows, words] → codes uint8 [rows, columns]."""
    packed = np.ascontiguousarray(words, "<u4").view(np.uint8)
    return unpack(packed, bits, columns)
