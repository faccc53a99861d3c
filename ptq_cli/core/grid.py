"""The points a weight may be rounded to, and how inputs are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.levels import SMALL_FLOATS, TABLES, SmallFloat

SUPER_BLOCK = 256  # columns
# Least and greatest multiple of a super-block's scale (and the greatest of its offset).
MULTIPLES = {"uint4": (0, 15), "uint6": (0, 63), "int6": (-32, 31), "int8": (-128, 127)}


@dataclass(frozen=True)
class Grid:
    """The points a weight may be rounded to: `weight ≈ scales · level`.

    levels: what codes mean: "integer", `code − zero`; or a table, which has no zeros (theirs are
        0): the small floats "e2m1" and "e4m3", or "iq4_nl"
    bits: width of a code, 2 to 8.
    group_size: columns that share a scale; −1 a whole row, 0 the whole tensor. The last group of
        a row may be short.
    block_rows: rows that share it, too; the last block of rows may be short.
    sym: zero in the middle, `zeros = 2^(bits−1)`; else zeros are chosen per group.
    narrow_range: symmetric only; codes stay within ±(2^(bits−1) − 1) of zero (±127, ±7).
    scale_dtype: "float16", "bfloat16", "float32"; "e8m0", powers of two; or "e4m3", which are
        divided by a `global_scale` of the tensor. Or integers ("uint4", "uint6", "int6", "int8"),
        multiples of a float16 that SUPER_BLOCK columns of a row share. Scales are rounded to it
        before codes are chosen.
    global_scale: of "e4m3" scales, a float32; 0 where a plan does not know it yet.
    mirrored: symmetric only, without narrow_range; a group may have the longer side of its codes
        above zero: its zero is then `2^(bits−1) − 1`.
    own_offsets: not symmetric; `weight ≈ scales · code + offsets` with offsets of any size, stored
        as scales are, multiples as those of another float16 of the super-block; zeros are 0.
    """

    bits: int
    group_size: int = 128
    sym: bool = True
    narrow_range: bool = False
    scale_dtype: str = "float16"
    mirrored: bool = False
    levels: str = "integer"
    block_rows: int = 1
    global_scale: float = 1.0
    own_offsets: bool = False

    @property
    def integers(self) -> bool:
        """Whether levels are integers."""
        return self.levels == "integer"

    @property
    def table(self) -> NDArray[np.float32] | None:
        """What each code means where levels are no integers."""
        return TABLES.get(self.levels)

    @property
    def multiples(self) -> tuple[int, int] | None:
        """The least and greatest scale where scales are multiples of a super-block's."""
        return MULTIPLES.get(self.scale_dtype)

    @property
    def small_float(self) -> SmallFloat | None:
        """What codes mean where they are small floats."""
        return SMALL_FLOATS.get(self.levels)

    @cached_property
    def max_code(self) -> int:
        return int(2**self.bits - 1)

    @cached_property
    def min_code(self) -> int:
        return 1 if self.narrow_range else 0

    @cached_property
    def mid_code(self) -> int:
        """The zero of a symmetric grid."""
        return int(2 ** (self.bits - 1))

    def width(self, in_features: int) -> int:
        """Columns in a full group of a row with `in_features` columns (at least 1)."""
        whole_row = self.group_size <= 0 or self.group_size > in_features
        return max(1, in_features if whole_row else self.group_size)

    def n_groups(self, in_features: int) -> int:
        """Groups in a row."""
        return max(1, ceil(in_features / self.width(in_features)))

    def starts(self, in_features: int) -> list[int]:
        """First column of each group, then `in_features`."""
        return [*range(0, in_features, self.width(in_features)), in_features]

    def runs(self, in_features: int) -> list[tuple[slice, slice]]:
        """Runs of equally long groups: (their columns, the groups)."""
        width = self.width(in_features)
        full = in_features // width
        runs = [(slice(0, full * width), slice(0, full))] if full else []
        if in_features % width:
            runs.append((slice(full * width, in_features), slice(full, full + 1)))
        return runs

    @property
    def grouping(self) -> tuple[int, bool]:
        """Which columns form groups: how many, and whether super-blocks hold the groups together.
        All that what a method prepares for a site may depend on."""
        return self.group_size, self.multiples is not None

    @property
    def by_rows(self) -> bool:
        """Whether no two rows share a scale."""
        return self.group_size != 0 and self.block_rows == 1

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of scales and zeros for a weight of `shape`."""
        if self.group_size == 0:
            return 1, 1
        return ceil(shape[0] / self.block_rows), self.n_groups(shape[1])

    def g_idx(self, in_features: int) -> NDArray[np.int32]:
        """Group of each column where columns were not reordered, int32 [in_features]."""
        return (np.arange(in_features) // self.width(in_features)).astype(np.int32)


@dataclass(frozen=True)
class Activation:
    """How a layer's inputs are rounded when it runs (W8A8, FP8).

    dynamic: every token finds its own scale (without `per_token`: all tokens together find one);
        else one scale for the tensor, known beforehand (QuantizedWeight.input_scale)
    levels: as the grid's, symmetric where they are a small float
    group_size: values of a token that share a scale, found by each token; 0: all of them
    scale_dtype: of groups' scales, as the grid's; "e4m3" under a global scale known beforehand
        (QuantizedWeight.input_scale), by which they are divided
    """

    bits: int = 8
    sym: bool = True
    dynamic: bool = True
    per_token: bool = True
    levels: str = "integer"
    group_size: int = 0
    scale_dtype: str = "float32"

    @property
    def calibrated(self) -> bool:
        """Whether a scale of theirs is known beforehand."""
        return not self.dynamic or self.scale_dtype == "e4m3"
