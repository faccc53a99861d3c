"""The solver's work on one panel of rows (numerics/gptq.py says what is computed)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ptq_cli.core.grid import SUPER_BLOCK, Grid
from ptq_cli.core.tensors import FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.numerics import super_blocks
from ptq_cli.numerics.feedback import Block, Feedback, Group
from ptq_cli.numerics.numbers import Limits, Scales, numbers_of
from ptq_cli.numerics.range_search import nonzero
from ptq_cli.numerics.refit import Sums, better_pair, better_scale
from ptq_cli.numerics.scales import stored_scales
from ptq_cli.numerics.super_blocks import Multiples, Shared

LEAF_COLUMNS = 16
# From the second on, a sweep that lowers the loss of its panel by less than this part is the last.
LEAST_GAIN = 0.002


@dataclass(frozen=True)
class Passes:
    """How hard to try: scale search, refine passes inside the group, at most so many sweeps over
    the row."""

    mse: bool = True
    refine: int = 2
    sweeps: int = 1


def _inner(a: FloatArray, b: FloatArray) -> float:
    """`Σ a · b`, in an order that no number of threads changes."""
    return float((a * b).sum(dtype=np.float64))


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


class Panel:
    """The work on one panel of rows: arrays [columns in visiting order, rows].

    weight: the panel's weight; importance: what weighs its scale search, or [columns, 1].
    error: weight − dequantized where a column is rounded; before that, what the columns rounded so
        far send it, `Σ_{i<k} E_i U_ik`.
    scales, zeros, offsets: of each group, [groups in visiting order, rows]
    shared: of each super-block, d and e, where scales are multiples of those
    loss: `Σ_k D_k |(E U)_k|²` of the columns rounded so far, where sweeps may end by it
    levels (in the methods): those of the group or block in hand, as floats.
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
        self.grid, self.blocks, self.numbers = grid, feedback.blocks, numbers_of(grid)
        self.error = np.zeros_like(weight)
        self.codes = np.empty((n, rows), np.uint8)
        self.scales = np.empty((len(feedback.groups), rows), weight.dtype)
        self.zeros = np.empty_like(self.scales)
        self.offsets = np.zeros_like(self.scales)
        self.shared: dict[int, Shared] = {}
        self.importance = feedback.pivots[:, None]
        self.loss = 0.0

    def run(self) -> None:
        starts = [0, *(block.columns.stop for block in self.blocks)]
        at = {block.columns.start: block for block in self.blocks}
        upper = self.feedback.upper
        _by_halves(starts, upper, self.error, self.error, lambda a, _: self._round_block(at[a]))
        for sweep in range(self.passes.sweeps):
            gain = sum([self._sweep_block(block) for block in self.blocks])
            if sweep > 0 and gain < LEAST_GAIN * self.loss:
                return
            self.loss -= gain

    @property
    def _measures(self) -> bool:
        """Whether what sweeps gain is measured: where a sweep after the second may follow."""
        return self.passes.sweeps > 2

    def store(self, result: QuantizedWeight) -> None:
        """Put the scales, zeros and offsets of all groups into a rounded weight of these rows."""
        order = np.argsort([group.number for group in self.feedback.groups])
        if self.shared:
            shape = (self.scales.shape[1], len(self.blocks), -1)
            own = [values[order].T.reshape(shape) for values in (self.scales, self.offsets)]
            blocks = np.argsort([block.number for block in self.blocks])
            parts = zip(*(self.shared[self.blocks[i].number] for i in blocks), strict=True)
            shared = Shared(*(np.stack(part, axis=1) for part in parts))
            super_blocks.store(Multiples(*own), shared, self.grid, result)
            return
        result.scales[:] = stored_scales(self.scales[order].T, self.grid)
        result.zeros[:] = self.zeros[order].T
        if result.offsets is not None:
            result.offsets[:] = self.offsets[order].T

    def _round_block(self, block: Block) -> None:
        columns, refined = block.columns, self.passes.refine > 0
        upper, start = self.feedback.upper[columns, columns], columns.start
        needed = start > 0 and (refined or self._measures)
        compensation = self.error[columns].copy() if needed else None
        if self.grid.multiples:
            self._share(block)
        levels = np.empty((columns.stop - start, self.weight.shape[1]), self.weight.dtype)
        at = {group.columns.start: group for group in block.groups}

        def visit(a: int, b: int) -> None:
            self._round_group(at[a], levels[a - start : b - start])

        cuts = [*at, columns.stop]
        _by_halves(cuts, upper, self.error, self.error, visit, base=start)
        if refined:
            constant: FloatArray | int = 0
            if compensation is not None:
                constant = (upper * self.feedback.pivots[columns]) @ compensation
            for _ in range(self.passes.refine):
                gradient = block.schur @ self.error[columns]
                gradient += constant
                self._descend(block, block.schur, gradient, levels)
        if self._measures:
            sent = upper.T @ self.error[columns]  # (E U)_g
            if compensation is not None:
                sent += compensation
            self.loss += _inner(self.feedback.pivots[columns, None] * sent, sent)
        self._write_codes(block, levels)

    def _share(self, block: Block) -> None:
        """d and e of a super-block, for its compensated weight."""
        shape = (len(block.groups), -1, self.weight.shape[1])
        target = self._compensated(block).reshape(shape)
        importance = self._importance(block)
        if importance is not None:
            importance = importance.reshape(*target.shape[:2], -1)
        fitted = super_blocks.fit_groups(target, self.grid, 1, importance)
        self.shared[block.number] = super_blocks.share(fitted, self.grid, 0)

    def _compensated(self, own: Block | Group) -> FloatArray:
        """`weight_g + A · U_gg⁻¹`, where nothing but the errors before these columns counts."""
        target = self.weight[own.columns]
        if own.inverse is not None:
            target = target + own.inverse @ self.error[own.columns]
        return target

    def _importance(self, own: Block | Group) -> FloatArray | None:
        return self.importance[own.columns] if self.passes.mse else None

    def _round_group(self, group: Group, levels: FloatArray) -> None:
        """Fit a group, then round its columns one by one, each at its target."""
        fitted = self._fit(group)
        self.scales[group.index], self.zeros[group.index] = fitted.scales, fitted.zeros
        if self.grid.own_offsets:
            self.offsets[group.index] = fitted.offsets
        upper = self.feedback.upper[group.columns, group.columns]
        start, stop = group.columns.start, group.columns.stop

        def visit(a: int, b: int) -> None:
            self._round_leaf(group, a, b, levels[a - start : b - start])

        _by_halves(_leaves(start, stop), upper, self.error, self.error, visit, base=start)

    def _fit(self, group: Group) -> Scales:
        """Scales, zeros and offsets [rows] for the compensated group."""
        if self.fixed is not None:
            return Scales(self.fixed[0][group.number], self.fixed[1][group.number])
        target, importance = self._compensated(group), self._importance(group)
        if not self.grid.multiples:
            return self.numbers.fit(target, self.grid, 0, importance)
        shared = self.shared[self._block_of(group)]
        own = super_blocks.fit_groups(target, self.grid, 0, importance)
        if importance is None:
            own = super_blocks.nearest_multiples(own, shared, self.grid)
        else:
            own = super_blocks.best_multiples(target, importance, own, shared, self.grid, 0)
        zeros = np.full_like(own.scales, super_blocks.zero_of(self.grid))
        return Scales(own.scales, zeros, own.offsets)

    def _block_of(self, group: Group) -> int:
        return group.number * self.grid.group_size // SUPER_BLOCK

    def _round_leaf(self, group: Group, a: int, b: int, levels: FloatArray) -> None:
        scale, limits = self.scales[group.index], self._limits(group)
        offset, divisor = self.offsets[group.index], nonzero(scale)
        upper = self.feedback.upper[a:b, a:b]
        for k, column in enumerate(range(a, b)):
            target = self.weight[column] + self.error[column]
            target += upper[:k, k] @ self.error[a:column]
            if self.grid.own_offsets:
                target -= offset
            target /= divisor
            self.numbers.round(target, limits, self.grid, levels[k])
            self.error[column] = self.weight[column] - levels[k] * scale
            if self.grid.own_offsets:
                self.error[column] -= offset

    def _limits(self, group: Group) -> Limits:
        return self.numbers.limits(self.zeros[group.index], self.grid)

    def _descend(
        self, block: Block, quadratic: FloatArray, gradient: FloatArray, levels: FloatArray
    ) -> None:
        """One pass of coordinate descent on `tr(E S Eᵀ) + …` over the columns of a block.

        quadratic: S [columns, columns]; gradient: P [columns, rows], half the gradient in E, used
        up. `levels` and the block's errors and scales are changed in place.
        """
        if self.shared:
            self._refit_shared(block, quadratic, gradient, levels)
        for group, own in self._parts(block):
            square, last = quadratic[own, own], group is block.groups[-1]
            before = None if last else self.error[group.columns].copy()
            if self.fixed is None:
                self._refit(group, square, gradient[own], levels[own])
            self._move_codes(group, square, gradient[own], levels[own])
            if before is not None:
                change = self.error[group.columns] - before
                gradient[own.stop :] += quadratic[own.stop :, own] @ change

    def _move_codes(
        self, group: Group, quadratic: FloatArray, gradient: FloatArray, levels: FloatArray
    ) -> None:
        """In levels: each column goes to that nearest to where its derivative is zero."""
        error, limits = self.error[group.columns], self._limits(group)
        scale = self.scales[group.index]
        diagonal = quadratic.diagonal()
        coupling, target, change = quadratic / diagonal, gradient, np.empty_like(error)
        target /= nonzero(scale)
        target /= diagonal[:, None]
        target += levels

        def visit(a: int, b: int) -> None:
            for k in range(a, b):
                place = target[k]
                place += coupling[a:k, k] @ change[a:k]
                moved = self.numbers.round(place, limits, self.grid, None)
                np.subtract(levels[k], moved, out=change[k])

        _by_halves(_leaves(0, len(error)), coupling, change, target, visit)
        levels -= change
        error += np.multiply(change, scale, out=change)

    def _refit(
        self, group: Group, quadratic: FloatArray, gradient: FloatArray, levels: FloatArray
    ) -> None:
        """Better scales and offsets for the levels as they are, kept where the cost falls."""
        index, error = group.index, self.error[group.columns]
        scale, offset = self.scales[index], self.offsets[index]
        spread = quadratic @ levels
        slope = np.einsum("kr,kr->r", levels, gradient)
        curvature = np.einsum("kr,kr->r", levels, spread)
        if not (self.grid.own_offsets or self.shared):
            moved = better_scale(scale, slope, curvature, self.grid)
        else:
            ones = quadratic.sum(1)
            square = np.full_like(scale, ones.sum() if self.grid.own_offsets else 0)
            sums = Sums(curvature, ones @ levels, square, slope, gradient.sum(0))
            if self.shared:
                own, shared = Multiples(scale, offset), self.shared[self._block_of(group)]
                moved, moved_offset = super_blocks.refit_multiples(own, shared, sums, self.grid)
            else:
                moved, moved_offset = better_pair(scale, offset, sums, self.grid)
            gradient -= np.multiply.outer(ones, moved_offset - offset)
            error -= moved_offset - offset
            self.offsets[index] = moved_offset
        delta = moved - scale
        gradient -= np.multiply(spread, delta, out=spread)
        error -= np.multiply(levels, delta, out=spread)
        self.scales[index] = moved

    def _refit_shared(
        self, block: Block, quadratic: FloatArray, gradient: FloatArray, levels: FloatArray
    ) -> None:
        """Better d and e of a super-block, integers and levels as they are."""
        shared, error = self.shared[block.number], self.error[block.columns]
        groups = slice(block.groups[0].index, block.groups[-1].index + 1)
        n, m = self.scales[groups] / shared.scales, self.offsets[groups] / shared.offsets
        shape = (len(n), -1, levels.shape[1])

        def of_groups(values: FloatArray) -> FloatArray:
            return np.asarray(values.reshape(shape).sum(1))

        u = (levels.reshape(shape) * n[:, None]).reshape(levels.shape)
        spread = quadratic @ u
        of_offsets = quadratic.reshape(len(quadratic), len(n), -1).sum(2) @ m
        sums = Sums(
            uu=np.einsum("kr,kr->r", u, spread),
            uv=(m * of_groups(spread)).sum(0),
            vv=(m * of_groups(of_offsets)).sum(0),
            up=np.einsum("kr,kr->r", u, gradient),
            vp=(m * of_groups(gradient)).sum(0),
        )
        moved = super_blocks.refit_shared(shared, sums, self.grid)
        change, other = moved.scales - shared.scales, moved.offsets - shared.offsets
        gradient -= spread * change
        gradient -= of_offsets * other
        error -= u * change
        error.reshape(shape)[...] -= (m * other)[:, None]
        self.scales[groups], self.offsets[groups] = n * moved.scales, m * moved.offsets
        self.shared[block.number] = moved

    def _sweep_block(self, block: Block) -> float:
        """How far the loss falls, `−tr(Δ (2 P + (H + λI) Δ)ᵀ)` with Δ the change of the error,
        where that is measured; else 0."""
        columns = block.columns
        levels = np.empty_like(self.error[columns])
        for group, own in self._parts(block):
            codes, zeros = self.codes[group.columns], self.zeros[group.index]
            levels[own] = self.numbers.read_codes(codes, zeros, self.grid)
        hessian = self.feedback.rows(columns.start, columns.stop)
        gradient = hessian @ self.error
        before = (self.error[columns].copy(), 2 * gradient) if self._measures else None
        self._descend(block, hessian[:, columns], gradient, levels)
        self._write_codes(block, levels)
        if before is None:
            return 0.0
        error, slope = before
        change = self.error[columns] - error
        slope += hessian[:, columns] @ change
        return -_inner(change, slope)

    def _write_codes(self, block: Block, levels: FloatArray) -> None:
        for group, own in self._parts(block):
            zeros = self.zeros[group.index]
            self.numbers.write_codes(levels[own], zeros, self.grid, self.codes[group.columns])

    def _parts(self, block: Block) -> list[tuple[Group, slice]]:
        """The groups of a block, and where their columns are in it."""
        start = block.columns.start
        ends = [(group, group.columns.start, group.columns.stop) for group in block.groups]
        return [(group, slice(a - start, b - start)) for group, a, b in ends]
