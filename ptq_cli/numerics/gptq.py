"""GPTQ in the LDL form, refinement inside the group, and sweeps over the row.

The loss of a rounded weight is `tr(E H Eᵀ)` with `E = weight − dequantized`. With `H + λI = U D Uᵀ`
(U unit upper triangular, D diagonal) it is `Σ_k D_k · |(E U)_k|²`, so rounding column k at

    target_k = weight_k + Σ_{i<k} E_i · U_ik

makes every term as small as one rounding can (Frantar et al., arXiv 2210.17323, in the form of Chee
et al., arXiv 2307.13304). Once a group g is rounded, and while all later columns are still
free to compensate, its cost is `tr(E_g S Eᵀ_g) + 2 tr(E_g U_gg D_g Aᵀ)` with `A = E_{<g} U_{<g,g}`
and the Schur complement `S = U_gg D_g U_ggᵀ`; half its gradient is `P = E_g S + A D_g U_ggᵀ`. A
*refine* pass refits the scales in closed form with codes fixed, then revisits each code (coordinate
descent as in QuantEase, arXiv 2309.01885, and CDQuant, arXiv 2406.17542, there on the whole row). A
*sweep* does the same for each group with `H + λI` in place of S and `P = E H`.

Layout: the weight is transposed, [in_features, rows], so that a column is contiguous. Rows do not
depend on each other given U; they are worked on in panels of a fixed size, so that the bytes do
not depend on how many workers share the panels. Columns are visited by halving: solve the left
half, bring its errors to the right half in one matrix product, solve the right half. Nearly all the
arithmetic is then in products of large matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.numerics.ldl import ldl_upper
from ptq_cli.numerics.numbers import Limits, numbers_of
from ptq_cli.numerics.parallel import each, strips
from ptq_cli.numerics.rounding import blank, round_to_nearest
from ptq_cli.numerics.scales import SCALE_LIMITS, round_scales, stored_scales

PANEL_ROWS = 2048
LEAF_COLUMNS = 16


@dataclass(frozen=True)
class Group:
    """Some of the columns, in the order of visits, and what depends on the Hessian alone.

    columns: their places in that order; number: the group's in the rounded weight
    schur: `S = U_gg D_g U_ggᵀ`; empty where groups are not refined
    inverse: `U_gg⁻ᵀ`, or None for the first group, which no error reaches
    """

    columns: slice
    number: int
    schur: FloatArray
    inverse: FloatArray | None


@dataclass(frozen=True)
class Feedback:
    """All that the linears of one site share: the factored Hessian and the order of the columns.

    grid, act_order: as `make_feedback` was given them
    order: column visited k-th, int [in_features]
    hessian, damping: H as it stands, and λ
    upper, pivots: `H + λI = upper · diag(pivots) · upperᵀ`, in that order
    groups: those of the grid, in that order
    """

    grid: Grid
    act_order: str
    order: NDArray[np.intp]
    hessian: FloatArray
    damping: np.floating[Any]
    upper: FloatArray
    pivots: FloatArray
    groups: tuple[Group, ...]

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows of H + λI in the order of visits, gathered when a sweep needs them: a copy of all of
        it would be a third large matrix."""
        rows = np.take(self.hessian[self.order[start:stop]], self.order, axis=1)
        here = np.arange(stop - start)
        rows[here, start + here] += self.damping
        return rows


def make_feedback(
    hessian: FloatArray, damp: float, grid: Grid, act_order: str, refine: bool = True
) -> Feedback:
    """Factor `hessian + damp · mean(diagonal) · I` with columns in the order of visits.

    act_order: as `column_order` knows it; refine: whether groups will be refined

    Raises:
        NotPositiveDefinite: raise `damp` and try again.
    """
    order, n = column_order(hessian, act_order, grid), len(hessian)
    damped = hessian[np.ix_(order, order)]
    damping = hessian.dtype.type(damp * hessian.diagonal().mean())
    damped.flat[:: n + 1] += damping
    upper, pivots = ldl_upper(damped, in_place=True)
    number = (np.arange(n) if act_order == "desc" else order) // grid.width(n)
    starts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), n]

    def group(ends: tuple[int, int]) -> Group:
        own = slice(*ends)
        block = upper[own, own]
        schur = (block * pivots[own]) @ block.T if refine else block[:0]
        inverse = np.linalg.inv(block).T if own.start else None
        return Group(own, int(number[own.start]), schur, inverse)

    groups = tuple(each(group, pairwise(starts)))
    return Feedback(grid, act_order, order, hessian, damping, upper, pivots, groups)


def column_order(hessian: FloatArray, act_order: str, grid: Grid) -> NDArray[np.intp]:
    """The order in which columns are visited.

    none: as they stand. desc: by falling Hessian diagonal; groups are formed in that order (the
    original desc_act, needs g_idx). static: groups stay what they are; groups by falling sum of
    their diagonal, columns inside a group by falling diagonal. Compared with visiting the columns
    of all groups interleaved, this keeps groups together, so that scales can look at the
    compensated group and refinement can refit them.
    """
    diagonal = hessian.diagonal()
    n = len(diagonal)
    if act_order == "none":
        return np.arange(n)
    if act_order == "desc":
        return np.argsort(-diagonal, kind="stable")
    groups = [np.arange(a, b) for a, b in pairwise(grid.starts(n))]
    groups.sort(key=lambda columns: -float(diagonal[columns].sum()))
    return np.concatenate([g[np.argsort(-diagonal[g], kind="stable")] for g in groups])


@dataclass(frozen=True)
class Passes:
    """How hard to try: scale search, refine passes inside the group, sweeps over the row."""

    mse: bool = True
    refine: int = 2
    sweeps: int = 1


def solve(
    weight: FloatArray,
    grid: Grid,
    feedback: Feedback,
    passes: Passes,
    importance: FloatArray | None = None,
    panel_rows: int = PANEL_ROWS,
) -> QuantizedWeight:
    """Round `weight` [out_features, in_features] with the feedback of its site.

    grid: the weight's own; its groups are the feedback's
    importance: weights of the scale search, [out_features, in_features]; None: each column's pivot
    panel_rows: rows that are worked on together

    Raises:
        InputError: a scale does not fit its stored dtype.
    """
    out_features, n = weight.shape
    order = feedback.order
    result = blank((out_features, n), grid)
    fixed = None
    if not grid.by_rows:
        fixed = _fixed_scales(weight, result, passes, importance)
    place = [group.number for group in feedback.groups]
    back = np.argsort(order)

    def work(rows: slice) -> None:
        own = None if fixed is None else (fixed[0][:, rows], fixed[1][:, rows])
        panel = _Panel(transposed(weight[rows])[order], grid, feedback, passes, own)
        if importance is not None:
            panel.importance = transposed(importance[rows].astype(weight.dtype))[order]
        panel.run()
        result.codes[rows] = transposed(panel.codes[back])
        if fixed is None:
            result.scales[rows, place] = stored_scales(panel.scales.T, grid)
            result.zeros[rows, place] = panel.zeros.T

    each(work, strips(out_features, panel_rows))
    if feedback.act_order != "desc":
        return result
    g_idx = np.empty(n, np.int32)
    g_idx[order] = grid.g_idx(n)
    return replace(result, g_idx=g_idx)


def _fixed_scales(
    weight: FloatArray, result: QuantizedWeight, passes: Passes, importance: FloatArray | None
) -> tuple[FloatArray, FloatArray]:
    """Scales that rows share cannot follow one panel's errors, so they look at the weight; they are
    put into `result`. Those and the zeros of each row, [n_groups, out_features]."""
    if importance is None:
        importance = np.ones(weight.shape[1], weight.dtype)
    rounded = round_to_nearest(weight, result.grid, importance if passes.mse else None)
    result.scales[:], result.zeros[:] = rounded.scales, rounded.zeros
    rows = np.arange(len(weight)) // result.grid.block_rows if len(rounded.scales) > 1 else 0
    shape = (rounded.scales.shape[1], len(weight))

    def of_rows(values: Array) -> FloatArray:
        own = values[rows].T if len(values) > 1 else values.T
        return np.broadcast_to(own, shape).astype(weight.dtype)

    return of_rows(rounded.float_scales()), of_rows(rounded.zeros)


def _leaves(start: int, stop: int) -> list[int]:
    return [*range(start, stop, LEAF_COLUMNS), stop]


def _by_halves(
    cuts: Sequence[int],
    coupling: FloatArray,
    source: FloatArray,
    sink: FloatArray,
    visit: Callable[[int, int], None],
    base: int = 0,
) -> None:
    """Visit [cuts[i], cuts[i+1]) from left to right; before columns [a, b) are visited, `sink[a:b]`
    has received `coupling[:a, a:b].T @ source[:a]`, summed from cuts[0] on.

    `coupling` is indexed from `base`: its first row and column belong to column `base`.
    """
    if len(cuts) == 2:
        visit(cuts[0], cuts[1])
        return
    half = len(cuts) // 2
    left, middle, right = cuts[0], cuts[half], cuts[-1]
    _by_halves(cuts[: half + 1], coupling, source, sink, visit, base)
    block = coupling[left - base : middle - base, middle - base : right - base]
    sink[middle:right] += block.T @ source[left:middle]
    _by_halves(cuts[half:], coupling, source, sink, visit, base)


class _Panel:
    """The work on one panel of rows: arrays [columns in visiting order, rows].

    weight: the panel's weight; importance: what weighs its scale search, or [columns, 1].
    error: weight − dequantized where a column is rounded; before that, what the columns rounded so
        far send it, `Σ_{i<k} E_i U_ik`.
    levels (in the methods): those of the group in hand, as floats.
    """

    def __init__(
        self,
        weight: FloatArray,
        grid: Grid,
        feedback: Feedback,
        passes: Passes,
        fixed: tuple[FloatArray, FloatArray] | None,
    ) -> None:
        n, rows = weight.shape
        self.weight, self.feedback, self.passes, self.fixed = weight, feedback, passes, fixed
        self.grid, self.groups, self.numbers = grid, feedback.groups, numbers_of(grid)
        self.error = np.zeros_like(weight)
        self.codes = np.empty((n, rows), np.uint8)
        self.scales = np.empty((len(self.groups), rows), weight.dtype)
        self.zeros = np.empty_like(self.scales)
        self.importance = feedback.pivots[:, None]
        self._index = {group.columns.start: i for i, group in enumerate(self.groups)}

    def run(self) -> None:
        starts = [0, *(group.columns.stop for group in self.groups)]
        _by_halves(starts, self.feedback.upper, self.error, self.error, self._round_group)
        for _ in range(self.passes.sweeps):
            for index in range(len(self.groups)):
                self._sweep_group(index)

    def _round_group(self, start: int, stop: int) -> None:
        index = self._index[start]
        group, schur = slice(start, stop), self.groups[index].schur
        upper = self.feedback.upper[group, group]
        refined = self.passes.refine > 0
        compensation = self.error[group].copy() if refined and index else None
        self.scales[index], self.zeros[index] = self._group_grid(index, group)
        levels = np.empty((stop - start, self.weight.shape[1]), self.weight.dtype)

        def visit(a: int, b: int) -> None:
            self._round_leaf(index, a, b, levels[a - start : b - start])

        _by_halves(_leaves(start, stop), upper, self.error, self.error, visit, base=start)
        if refined:
            constant: FloatArray | int = 0
            if compensation is not None:
                constant = (upper * self.feedback.pivots[group]) @ compensation
            for _ in range(self.passes.refine):
                gradient = schur @ self.error[group]
                gradient += constant
                self._descend(index, schur, gradient, levels)
        self.numbers.write_codes(levels, self.zeros[index], self.grid, self.codes[group])

    def _group_grid(self, index: int, group: slice) -> tuple[FloatArray, FloatArray]:
        """Scales and zeros [rows] for the compensated group, `weight_g + A · U_gg⁻¹`."""
        if self.fixed is not None:
            number = self.groups[index].number
            return self.fixed[0][number], self.fixed[1][number]
        target, inverse = self.weight[group], self.groups[index].inverse
        if inverse is not None:
            target = target + inverse @ self.error[group]
        importance = self.importance[group] if self.passes.mse else None
        return self.numbers.fit(target, self.grid, 0, importance)

    def _round_leaf(self, index: int, a: int, b: int, levels: FloatArray) -> None:
        """Round columns a … b−1 of a group one by one, each at its target."""
        scale, limits = self.scales[index], self._limits(index)
        upper = self.feedback.upper[a:b, a:b]
        for k, column in enumerate(range(a, b)):
            target = self.weight[column] + self.error[column]
            target += upper[:k, k] @ self.error[a:column]
            target /= scale
            self.numbers.round(target, limits, self.grid, levels[k])
            self.error[column] = self.weight[column] - levels[k] * scale

    def _limits(self, index: int) -> Limits:
        return self.numbers.limits(self.zeros[index], self.grid)

    def _descend(
        self, index: int, quadratic: FloatArray, gradient: FloatArray, levels: FloatArray
    ) -> None:
        """One pass of coordinate descent on `tr(E S Eᵀ) + …` over the columns of a group.

        quadratic: S [columns, columns]; gradient: P [columns, rows], half the gradient in E, used
        up. `levels` and the group's errors and scales are changed in place.
        """
        error = self.error[self.groups[index].columns]
        if self.fixed is None:
            self._refit(index, quadratic, gradient, levels)
        # From here on in levels: column k goes to that nearest to where its derivative is zero.
        scale, limits = self.scales[index], self._limits(index)
        diagonal = quadratic.diagonal()
        coupling, target, change = quadratic / diagonal, gradient, np.empty_like(error)
        target /= scale
        target /= diagonal[:, None]
        target += levels

        def visit(a: int, b: int) -> None:
            for k in range(a, b):
                target[k] += coupling[a:k, k] @ change[a:k]
                change[k] = levels[k] - self.numbers.round(target[k], limits, self.grid, None)

        _by_halves(_leaves(0, len(error)), coupling, change, target, visit)
        levels -= change
        error += np.multiply(change, scale, out=change)

    def _refit(
        self, index: int, quadratic: FloatArray, gradient: FloatArray, levels: FloatArray
    ) -> None:
        """The best scales for the levels as they are: `Δs = Σ_k l_k P_k / (l S lᵀ)`, rounded to the
        stored dtype and kept only where the cost falls."""
        scale, error = self.scales[index], self.error[self.groups[index].columns]
        spread = quadratic @ levels
        slope = np.einsum("kr,kr->r", levels, gradient)
        curvature = np.einsum("kr,kr->r", levels, spread)
        moved = scale + np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
        largest = SCALE_LIMITS[self.grid.scale_dtype][1] / self.grid.global_scale
        moved = np.minimum(moved, largest)  # a refit is no error
        moved = round_scales(np.where(moved > 0, moved, scale), self.grid)
        delta = moved - scale
        falls = delta * (2 * slope - delta * curvature) > 0
        delta = np.where(falls, delta, 0)
        gradient -= np.multiply(spread, delta, out=spread)
        error -= np.multiply(levels, delta, out=spread)
        self.scales[index] = np.where(falls, moved, scale)

    def _sweep_group(self, index: int) -> None:
        group = self.groups[index].columns
        levels = self.numbers.read_codes(self.codes[group], self.zeros[index], self.grid)
        hessian = self.feedback.rows(group.start, group.stop)
        gradient = hessian @ self.error
        self._descend(index, hessian[:, group], gradient, levels)
        self.numbers.write_codes(levels, self.zeros[index], self.grid, self.codes[group])


def transposed(matrix: Array) -> Array:
    """`matrix.T`, C-ordered. Copied in strips of rows: the caches hold a strip, not a matrix."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for rows in strips(matrix.shape[0], 64):
        result[:, rows] = matrix[rows].T
    return result
