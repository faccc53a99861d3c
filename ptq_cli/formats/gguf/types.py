"""ggml's types of blocks: the numbers each holds, as a grid, and how a block lays them out.

A row is cut into blocks, which lie back to back; all parts are little endian:

    type    columns  bytes  parts                                            value of a column
    Q4_0     32       18    d F16, qs [16]                                   d (code − 8)
    Q4_1     32       20    d F16, m F16, qs [16]                            d code + m
    Q5_0     32       22    d F16, qh [4], qs [16]                           d (code − 16)
    Q5_1     32       24    d F16, m F16, qh [4], qs [16]                    d code + m
    Q8_0     32       34    d F16, qs I8 [32], of codes − 128                d (code − 128)
    Q2_K    256       84    scales [16], qs [64], d F16, dmin F16            d sc code − dmin mn
    Q3_K    256      110    qh [32], qs [64], scales [12], d F16             d sc (code − 4)
    Q4_K    256      144    d F16, dmin F16, scales [12], qs [128]           d sc code − dmin mn
    Q5_K    256      176    d F16, dmin F16, scales [12], qh [32], qs [128]  d sc code − dmin mn
    Q6_K    256      210    qs [128], qh [64], scales I8 [16], d F16         d sc (code − 32)
    IQ4_NL   32       18    d F16, qs [16]                                   d table[code]
    IQ4_XS  256      136    d F16, scales_h [2], scales_l [4], qs [128]      d sc table[code]
    MXFP4    32       17    d E8M0, qs [16]                                  d E2M1
    NVFP4    64       36    d E4M3 [4], qs [32]                              d E2M1

sc and mn are whole numbers of the column's group, as many groups as the grid says (Q3_K and IQ4_XS
store sc + 32). qs holds the low bits of codes, qh the others; which ones a byte holds, `Bits` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ptq_cli.core.grid import SUPER_BLOCK, Grid


@dataclass(frozen=True)
class Bits:
    """Some bits of each number of a block, all in one part of it: `bits` of them, from bit `shift`.

    The numbers are cut into runs. A run has its own bytes, n of them, and byte i has the bits of
    its numbers i, i + n, i + 2n, …, those of the first lowest.
    """

    part: str
    shift: int
    bits: int
    run: int


@dataclass(frozen=True)
class BlockType:
    """A type of block.

    name: ggml's
    block: its columns
    grid: of the weights in it; symmetric ones may be mirrored where scales are floats
    layout: its parts in order, with numpy's word for their dtype and how many there are
    codes: where the bits of codes are
    multiples: where those of sc (and then of mn) are; () where they have an order of their own
    """

    name: str
    block: int
    grid: Grid
    layout: tuple[tuple[str, str, int], ...]
    codes: tuple[Bits, ...]
    multiples: tuple[Bits, ...] = ()

    @cached_property
    def parts(self) -> np.dtype[Any]:
        """A block as a structure."""
        fields = [(name, word, (n,)) if n > 1 else (name, word) for name, word, n in self.layout]
        return np.dtype(fields)

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.parts.itemsize

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.block


_D, _M, _DMIN = ("d", "<f2", 1), ("m", "<f2", 1), ("dmin", "<f2", 1)
_LOW_HALVES = Bits("qs", 0, 4, 32)  # columns 0 … 15 in the low nibbles, 16 … 31 in the high ones
_FIFTH = Bits("qh", 4, 1, 8)  # one word: that of column j is bit j


def _part(name: str, count: int) -> tuple[str, str, int]:
    return name, "u1", count


def _flat(bits: int, **own: Any) -> Grid:
    return Grid(bits, 32, scale_dtype="float16", **own)


def _offset(bits: int, width: int, scale_dtype: str) -> Grid:
    return Grid(bits, width, sym=False, own_offsets=True, scale_dtype=scale_dtype)


_TYPES = (
    BlockType("Q4_0", 32, _flat(4), (_D, _part("qs", 16)), (_LOW_HALVES,)),
    BlockType(
        "Q4_1", 32, _offset(4, 32, "float16"), (_D, _M, _part("qs", 16)), (_LOW_HALVES,)
    ),
    BlockType(
        "Q5_0", 32, _flat(5), (_D, _part("qh", 4), _part("qs", 16)), (_LOW_HALVES, _FIFTH)
    ),
    BlockType(
        "Q5_1", 32, _offset(5, 32, "float16"),
        (_D, _M, _part("qh", 4), _part("qs", 16)),
        (_LOW_HALVES, _FIFTH),
    ),
    BlockType("Q8_0", 32, _flat(8), (_D, _part("qs", 32)), (Bits("qs", 0, 8, 32),)),
    BlockType(
        "Q2_K", SUPER_BLOCK, _offset(2, 16, "uint4"),
        (_part("scales", 16), _part("qs", 64), _D, _DMIN),
        (Bits("qs", 0, 2, 128),),
        (Bits("scales", 0, 4, 32),),
    ),
    BlockType(
        "Q3_K", SUPER_BLOCK, Grid(3, 16, scale_dtype="int6"),
        (_part("qh", 32), _part("qs", 64), _part("scales_l", 8), _part("scales_h", 4), _D),
        (Bits("qs", 0, 2, 128), Bits("qh", 2, 1, 256)),
        (Bits("scales_l", 0, 4, 16), Bits("scales_h", 4, 2, 16)),
    ),
    BlockType(
        "Q4_K", SUPER_BLOCK, _offset(4, 32, "uint6"),
        (_D, _DMIN, _part("scales", 12), _part("qs", 128)),
        (Bits("qs", 0, 4, 64),),
    ),
    BlockType(
        "Q5_K", SUPER_BLOCK, _offset(5, 32, "uint6"),
        (_D, _DMIN, _part("scales", 12), _part("qh", 32), _part("qs", 128)),
        (Bits("qs", 0, 4, 64), Bits("qh", 4, 1, 256)),
    ),
    BlockType(
        "Q6_K", SUPER_BLOCK, Grid(6, 16, scale_dtype="int8"),
        (_part("qs", 128), _part("qh", 64), _part("scales", 16), _D),
        (Bits("qs", 0, 4, 128), Bits("qh", 4, 2, 128)),
        (Bits("scales", 0, 8, 16),),
    ),
    BlockType("IQ4_NL", 32, _flat(4, levels="iq4_nl"), (_D, _part("qs", 16)), (_LOW_HALVES,)),
    BlockType(
        "IQ4_XS", SUPER_BLOCK, Grid(4, 32, levels="iq4_nl", scale_dtype="int6"),
        (_D, _part("scales_h", 2), _part("scales_l", 4), _part("qs", 128)),
        (_LOW_HALVES,),
        (Bits("scales_l", 0, 4, 2), Bits("scales_h", 4, 2, 4)),
    ),
    BlockType(
        "MXFP4", 32, Grid(4, 32, levels="e2m1", scale_dtype="e8m0"),
        (_part("d", 1), _part("qs", 16)),
        (_LOW_HALVES,),
    ),
    BlockType(
        "NVFP4", 64, Grid(4, 16, levels="e2m1", scale_dtype="e4m3"),
        (_part("d", 4), _part("qs", 32)),
        (Bits("qs", 0, 4, 16),),
    ),
)  # fmt: skip
TYPES = {kind.name: kind for kind in _TYPES}
