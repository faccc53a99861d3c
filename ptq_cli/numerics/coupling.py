"""Rows of a weight that are rounded for one another.

Where changes of a linear's outputs weigh `δᵀ F δ`, the loss of a rounded weight is `tr(F E H Eᵀ)`:
Kronecker factors, as in K-FAC (arXiv 1503.05671) and, for rounding, YAQA (arXiv 2505.22988). GPTQ
alone takes F for the identity, and rows do not depend on each other. With `F = U D Uᵀ`, U block
upper triangular with identities on its diagonal, D block diagonal, the loss is

    Σ_l tr(D_l A_l H A_lᵀ),   A_l = E_l + Σ_{k<l} U_klᵀ E_k,

so as a column makes up for the columns before it, a level of rows makes up for the levels before
it: its target is `weight_l + Σ_{k<l} U_klᵀ E_k`, and inside a level D_l is taken for the identity.
Levels are interleaved, row l, l + LEVELS, …; with one level a row little more would be won.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.statistics import Coupling
from ptq_cli.core.tensors import FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.numerics.feedback import Feedback
from ptq_cli.numerics.gptq import PANEL_ROWS, solve
from ptq_cli.numerics.ldl import NotPositiveDefinite, ldl_upper
from ptq_cli.numerics.panel import Passes
from ptq_cli.numerics.rounding import blank

LEVELS = 8
# Added to F, as a part of its mean diagonal: F is far from full rank, and it is only about right.
DAMPING = 0.3


def make_coupling(fisher: NDArray[np.float32], levels: int = LEVELS) -> Coupling | None:
    """The coupling by F, [out_features, out_features]; None where F says nothing, or too
    much of too little to be factored."""
    n = len(fisher)
    mean = float(fisher.diagonal().mean(dtype=np.float64))
    if not (np.isfinite(fisher).all() and mean > 0):
        return None
    rows = [np.arange(level, n, levels) for level in range(min(levels, n))]
    order, stops = np.concatenate(rows), np.cumsum([len(own) for own in rows]).tolist()
    damped = fisher[np.ix_(order, order)] / np.float32(mean)
    damped.flat[:: n + 1] += np.float32(DAMPING)
    try:
        upper, _ = ldl_upper(damped, in_place=True)
    except NotPositiveDefinite:  # a few tokens of the vocabulary make all of F
        return None
    for own in (slice(start, stop) for start, stop in pairwise([0, *stops])):
        upper[: own.stop, own] = upper[: own.stop, own] @ np.linalg.inv(upper[own, own])
    return Coupling(order, tuple(stops), upper)


def solve_coupled(
    weight: FloatArray,
    grid: Grid,
    feedback: Feedback,
    passes: Passes,
    coupling: Coupling,
    importance: FloatArray | None = None,
) -> QuantizedWeight:
    """`solve`, level by level.

    weight, importance: [out_features, in_features], as `solve` knows them; no rows share scales
    """
    result = blank((weight.shape[0], weight.shape[1]), grid)
    error = np.empty_like(weight)  # rows in the order of visits
    start, panel_rows = 0, max(1, PANEL_ROWS // len(coupling.stops))
    for stop in coupling.stops:
        rows = coupling.order[start:stop]
        sent = coupling.upper[:start, start:stop].astype(weight.dtype, copy=False)
        target = weight[rows] + sent.T @ error[:start]
        own = None if importance is None else importance[rows]
        part = solve(target, grid, feedback, passes, own, panel_rows)
        error[start:stop] = weight[rows] - part.dequantized()
        result.put(rows, part)
        start = stop
    return replace(result, g_idx=part.g_idx)
