"""ggml's types of blocks, as grids: which numbers each holds, and how many columns a block has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptq_cli.core.grid import SUPER_BLOCK, Grid


@dataclass(frozen=True)
class BlockType:
    """A type of block.

    name: ggml's; block: its columns; nbytes: of a block
    grid: of the weights in it; symmetric ones may be mirrored where scales are floats
    """

    name: str
    block: int
    nbytes: int
    grid: Grid

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.block


def _floats(bits: int, **own: Any) -> Grid:
    return Grid(bits, 32, scale_dtype="float16", **own)


def _offset(bits: int, width: int, scale_dtype: str) -> Grid:
    return Grid(bits, width, sym=False, own_offsets=True, scale_dtype=scale_dtype)


_IQ4: dict[str, Any] = {"bits": 4, "group_size": 32, "levels": "iq4_nl"}

TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 32, 18, _floats(4)),
        BlockType("Q4_1", 32, 20, _offset(4, 32, "float16")),
        BlockType("Q5_0", 32, 22, _floats(5)),
        BlockType("Q5_1", 32, 24, _offset(5, 32, "float16")),
        BlockType("Q8_0", 32, 34, _floats(8)),
        BlockType("Q2_K", SUPER_BLOCK, 84, _offset(2, 16, "uint4")),
        BlockType("Q3_K", SUPER_BLOCK, 110, Grid(3, 16, scale_dtype="int6")),
        BlockType("Q4_K", SUPER_BLOCK, 144, _offset(4, 32, "uint6")),
        BlockType("Q5_K", SUPER_BLOCK, 176, _offset(5, 32, "uint6")),
        BlockType("Q6_K", SUPER_BLOCK, 210, Grid(6, 16, scale_dtype="int8")),
        BlockType("IQ4_NL", 32, 18, Grid(**_IQ4, scale_dtype="float16")),
        BlockType("IQ4_XS", SUPER_BLOCK, 136, Grid(**_IQ4, scale_dtype="int6")),
        BlockType("MXFP4", 32, 17, Grid(4, 32, levels="e2m1", scale_dtype="e8m0")),
        BlockType("NVFP4", 64, 36, Grid(4, 16, levels="e2m1", scale_dtype="e4m3")),
    )
}
