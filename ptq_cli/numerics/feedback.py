"""The factored Hessian of a site, and the order in which its columns are visited."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import SUPER_BLOCK, Grid
from ptq_cli.core.tensors import FloatArray
from ptq_cli.numerics.ldl import ldl_upper
from ptq_cli.numerics.parallel import each


@dataclass(frozen=True)
class Group:
    """Some of the columns, in the order of visits, and what depends on the Hessian alone.

    columns: their places in that order
    index, number: the group's in that order, and in the rounded weight
    inverse: `U_gg⁻ᵀ`, or None for the first group, which no error reaches
    """

    columns: slice
    index: int
    number: int
    inverse: FloatArray | None


@dataclass(frozen=True)
class Block:
    """The groups that are refined together: those of a super-block, whose scales are multiples of
    one float16; else one group.

    columns, number, inverse: as a group's
    schur: `S = U_gg D_g U_ggᵀ`, g being all of its columns; empty where nothing is refined
    """

    columns: slice
    number: int
    inverse: FloatArray | None
    groups: tuple[Group, ...]
    schur: FloatArray


@dataclass(frozen=True)
class Feedback:
    """All that the linears of one site share, whatever their bits: the factored Hessian and the
    order of the columns.

    act_order: as `make_feedback` was given it
    order: column visited k-th, int [in_features]
    hessian, damping: H as it stands, and λ
    upper, pivots: `H + λI = upper · diag(pivots) · upperᵀ`, in that order
    blocks: those of the columns, in that order
    """

    act_order: str
    order: NDArray[np.intp]
    hessian: FloatArray
    damping: np.floating[Any]
    upper: FloatArray
    pivots: FloatArray
    blocks: tuple[Block, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for block in self.blocks for group in block.groups)

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

    grid: one of those that it will serve: all of the same `grouping`
    act_order: as `column_order` knows it; refine: whether groups will be refined

    Raises:
        NotPositiveDefinite: raise `damp` and try again.
    """
    order, n = column_order(hessian, act_order, grid), len(hessian)
    damped = hessian[np.ix_(order, order)]
    damping = hessian.dtype.type(damp * hessian.diagonal().mean())
    damped.flat[:: n + 1] += damping
    upper, pivots = ldl_upper(damped, in_place=True)
    places = np.arange(n) if act_order == "desc" else order
    numbers = places // grid.width(n)
    per_block = SUPER_BLOCK // grid.width(n) if grid.multiples else 1
    cuts = _changes(numbers)

    def inverse(columns: slice) -> FloatArray | None:
        return np.linalg.inv(upper[columns, columns]).T if columns.start else None

    def block(ends: tuple[int, int]) -> Block:
        groups = []
        for index in range(*ends):
            columns = slice(cuts[index], cuts[index + 1])
            groups.append(Group(columns, index, int(numbers[columns.start]), inverse(columns)))
        columns, first = slice(groups[0].columns.start, groups[-1].columns.stop), groups[0]
        own = upper[columns, columns]
        schur = (own * pivots[columns]) @ own.T if refine else own[:0]
        whole = first.inverse if len(groups) == 1 else inverse(columns)
        return Block(columns, first.number // per_block, whole, tuple(groups), schur)

    starts = _changes(numbers[cuts[:-1]] // per_block)
    blocks = tuple(each(block, pairwise(starts)))
    return Feedback(act_order, order, hessian, damping, upper, pivots, blocks)


def _changes(numbers: NDArray[np.intp]) -> list[int]:
    """Where runs of equal numbers start, then the end of the last."""
    return [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]


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
    if grid.multiples:  # super-blocks stay together, too
        blocks = diagonal.reshape(-1, SUPER_BLOCK).sum(1)
        rank = np.argsort(np.argsort(-blocks, kind="stable"))
        groups.sort(key=lambda columns: int(rank[columns[0] // SUPER_BLOCK]))
    return np.concatenate([g[np.argsort(-diagonal[g], kind="stable")] for g in groups])
