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
*sweep* does the same for each group with `H + λI` in place of S and `P = E H`. Where the scales of
groups are multiples of a super-block's, "group" is the super-block there: its own scale is refitted
first, then each group's integer.

Layout: the weight is transposed, [in_features, rows], so that a column is contiguous. Rows do not
depend on each other given U; they are worked on in panels of a fixed size, so that the bytes do
not depend on how many workers share the panels. Columns are visited by halving: solve the left
half, bring its errors to the right half in one matrix product, solve the right half. Nearly all the
arithmetic is then in products of large matrices.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.numerics.feedback import Feedback
from ptq_cli.numerics.panel import Panel, Passes
from ptq_cli.numerics.parallel import each, strips
from ptq_cli.numerics.rounding import blank, round_to_nearest

PANEL_ROWS = 2048


def solve(
    weight: FloatArray,
    grid: Grid,
    feedback: Feedback,
    passes: Passes,
    importance: FloatArray | None = None,
    panel_rows: int = PANEL_ROWS,
) -> QuantizedWeight:
    """Round `weight` [out_features, in_features] with the feedback of its site.

    grid: the weight's own, of the feedback's `grouping`
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
    back = np.argsort(order)

    def work(rows: slice) -> None:
        own = None if fixed is None else (fixed[0][:, rows], fixed[1][:, rows])
        panel = Panel(transposed(weight[rows])[order], grid, feedback, passes, own)
        if importance is not None:
            panel.importance = transposed(importance[rows].astype(weight.dtype))[order]
        panel.run()
        result.codes[rows] = transposed(panel.codes[back])
        if fixed is None:
            panel.store(result.panel(rows))

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


def transposed(matrix: Array) -> Array:
    """`matrix.T`, C-ordered. Copied in strips of rows: the caches hold a strip, not a matrix."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for rows in strips(matrix.shape[0], 16):
        result[:, rows] = matrix[rows].T
    return result
