"""A rounded weight. Its arrays are never written to after construction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import SUPER_BLOCK, Grid
from ptq_cli.core.tensors import Array, Codes


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight.

    codes: uint8 [out_features, in_features], 0 … 2^bits − 1
    scales: as `grid.scale_dtype` stores them (ml_dtypes' for "e8m0" and "e4m3"; uint8 or int8
        multiples), of `grid.scales_shape`: [out_features, n_groups], [1, 1] for a whole-tensor grid
    zeros: uint8, the same shape as scales; 0 where levels are no integers or offsets their own
    g_idx: int32 [in_features] where `act_order desc` reordered the groups, else None
    offsets: the dtype and shape of scales, `weight ≈ scales · codes + offsets`: of a grid with
        `own_offsets`; or where the layout it was read from stores them and no zeros say the same
        exactly, zeros then are the nearest
    super_scales, super_offsets: float16 [out_features, in_features / SUPER_BLOCK], where scales are
        multiples of the former; offsets are multiples of the latter and are subtracted:
        `weight ≈ super_scales · scales · code − super_offsets · offsets`
    input_scale, input_zero: of inputs with a static scale: `input ≈ input_scale · (code −
        input_zero)`; the zero is unsigned like all codes and only where the inputs are not
        symmetric
    """

    codes: Codes
    scales: Array
    zeros: Codes
    grid: Grid
    g_idx: NDArray[np.int32] | None = None
    offsets: Array | None = None
    input_scale: float | None = None
    input_zero: int | None = None
    super_scales: NDArray[np.float16] | None = None
    super_offsets: NDArray[np.float16] | None = None

    def column_groups(self) -> NDArray[np.int32]:
        """Group of each column, int32 [in_features]."""
        return self.grid.g_idx(self.codes.shape[1]) if self.g_idx is None else self.g_idx

    def panel(self, rows: slice) -> QuantizedWeight:
        """Some of its rows, in the same memory. (The group is not the whole tensor; rows begin
        where a block of them does.)"""
        first = rows.start // self.grid.block_rows
        blocks = slice(first, ceil(rows.stop / self.grid.block_rows))
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[blocks],
            zeros=self.zeros[blocks],
            offsets=None if self.offsets is None else self.offsets[blocks],
            super_scales=None if self.super_scales is None else self.super_scales[rows],
            super_offsets=None if self.super_offsets is None else self.super_offsets[rows],
        )

    def put(self, rows: NDArray[np.intp], part: QuantizedWeight) -> None:
        """Fill some of its rows with those of another on the same grid."""
        for name in ("codes", "scales", "zeros", "offsets", "super_scales", "super_offsets"):
            values = getattr(self, name)
            if values is not None:
                values[rows] = getattr(part, name)

    @np.errstate(over="ignore")  # who looks at it finds what is not finite
    def dequantized(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """`scales · level` (or with offsets) as float32 [rows, in_features]."""
        table, offsets = self.grid.table, self.float_offsets()
        result: NDArray[np.float32]
        if table is not None:
            result = table[self.codes[rows]]
        else:
            result = self.codes[rows].astype(np.float32)
            if offsets is None:
                self._by_group(np.subtract, result, self.zeros, rows)
        self._by_group(np.multiply, result, self.float_scales(), rows)
        if offsets is not None:
            self._by_group(np.add, result, offsets, rows)
        return result

    def float_scales(self) -> Array:
        """The scales as they multiply levels, in a dtype that numpy computes in."""
        if self.grid.scale_dtype == "e8m0":
            return self.scales.astype(np.float32)
        if self.grid.scale_dtype == "e4m3":
            return self.scales.astype(np.float32) / np.float32(self.grid.global_scale)
        if self.super_scales is not None:
            return self._multiplied(self.scales, self.super_scales)
        return self.scales

    def float_offsets(self) -> Array | None:
        """The offsets as they are added, in a dtype that numpy computes in, where there are any."""
        if self.offsets is not None and self.super_offsets is not None:
            return -self._multiplied(self.offsets, self.super_offsets)
        return self.offsets

    def _multiplied(self, multiples: Array, of_block: NDArray[np.float16]) -> NDArray[np.float32]:
        """Multiples of a super-block's float16, exact in float32."""
        own = np.repeat(of_block.astype(np.float32), SUPER_BLOCK // self.grid.group_size, axis=1)
        return own * multiples.astype(np.float32)

    def _by_group(
        self, operation: np.ufunc, result: NDArray[np.float32], values: Array, rows: slice
    ) -> None:
        """`result = operation(result, values of each column's group)`, in place."""
        own = self._of_rows(values, rows).astype(np.float32)
        if self.g_idx is not None:
            operation(result, own[:, self.g_idx], out=result)
            return
        for columns, groups in self.grid.runs(result.shape[1]) if result.size else ():
            part = result[:, columns].reshape(len(result), groups.stop - groups.start, -1)
            operation(part, own[:, groups, None], out=part)
            if not np.may_share_memory(part, result):  # a short last group: reshape copied
                result[:, columns] = part.reshape(len(result), -1)

    def _of_rows(self, values: Array, rows: slice) -> Array:
        """Scales (or zeros, offsets) of these rows; one row of them where all have the same."""
        if self.grid.group_size == 0:
            return values
        if self.grid.block_rows == 1:
            return values[rows]
        block = np.arange(len(self.codes))[rows] // self.grid.block_rows
        return values[block]
