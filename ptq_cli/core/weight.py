"""A rounded weight. Its arrays are never written to after construction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Array, Codes


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight.

    codes: uint8 [out_features, in_features], 0 … 2^bits − 1
    scales: as `grid.scale_dtype` stores them (ml_dtypes' for "e8m0" and "e4m3"), of
        `grid.scales_shape`: [out_features, n_groups], [1, 1] for a whole-tensor grid
    zeros: uint8, the same shape as scales; 0 where levels are no integers
    g_idx: int32 [in_features] where `act_order desc` reordered the groups, else None
    offsets: the dtype and shape of scales, where the layout it was read from stores
        `scales · codes + offsets` and no zeros say the same exactly; zeros then are the nearest
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

    def column_groups(self) -> NDArray[np.int32]:
        """Group of each column, int32 [in_features]."""
        return self.grid.g_idx(self.codes.shape[1]) if self.g_idx is None else self.g_idx

    def panel(self, rows: slice) -> QuantizedWeight:
        """Some of its rows, in the same memory. (The group is not the whole tensor; rows begin
        where a block of them does.)"""
        first = rows.start // self.grid.block_rows
        blocks = slice(first, ceil(rows.stop / self.grid.block_rows))
        return replace(
            self, codes=self.codes[rows], scales=self.scales[blocks], zeros=self.zeros[blocks]
        )

    @np.errstate(over="ignore")  # who looks at it finds what is not finite
    def dequantized(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """`scales · level` (or with offsets) as float32 [rows, in_features]."""
        table = self.grid.small_float
        result: NDArray[np.float32]
        if table is not None:
            result = table.values[self.codes[rows]]
        else:
            result = self.codes[rows].astype(np.float32)
            if self.offsets is None:
                self._by_group(np.subtract, result, self.zeros, rows)
        self._by_group(np.multiply, result, self.float_scales(), rows)
        if self.offsets is not None:
            self._by_group(np.add, result, self.offsets, rows)
        return result

    def float_scales(self) -> Array:
        """The scales as they multiply levels, in a dtype that numpy computes in."""
        if self.grid.scale_dtype == "e8m0":
            return self.scales.astype(np.float32)
        if self.grid.scale_dtype == "e4m3":
            return self.scales.astype(np.float32) / np.float32(self.grid.global_scale)
        return self.scales

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
