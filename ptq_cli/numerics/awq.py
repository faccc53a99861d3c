"""Activation-aware weight quantization: factors and clipping that spare the weights that matter.

Lin et al., arXiv 2306.00978. A channel with large inputs is scaled up before its weights are
rounded, `Ŵ = Q(W · s) / s`, so that it takes less of the rounding error; then each group's range is
shrunk where that lowers the error of the outputs. Details are as in the authors' code
(mit-han-lab/llm-awq, auto_scale.py and auto_clip.py).

Everything here needs of the inputs is `inputs.T @ inputs`: in their place any matrix R with
`R.T @ R / len(R) = hessian` serves (`hessian_root`). Shapes: inputs float32 [n, in_features];
weights [out_features, in_features] each; factors float32 [in_features].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.numerics.ldl import ldl_upper
from ptq_cli.numerics.parallel import pieces
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.scales import ScaleOverflow
from ptq_cli.numerics.smoothquant import Factors, panels

_ELEMENTS = 1 << 18  # weights of one group looked at together by the clip search


def awq_factors(input_absmean: Array, ratio: float) -> Factors:
    """`s = max(absmean^ratio, 1e-4)`, then `s / sqrt(max s · min s)`: float32 [in_features].

    input_absmean: [in_features], mean absolute input of each channel; ratio: 0 to 1

    Raises:
        NumericalError: a mean is not finite.
    """
    if not np.isfinite(input_absmean).all():
        raise NumericalError("the channels' absolute means hold NaN or infinity")
    scales = np.maximum(input_absmean.astype(np.float64) ** ratio, 1e-4)
    if scales.size == 0:
        return scales.astype(np.float32)
    factors: Factors = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
    return factors


def scale_losses(
    inputs: FloatArray,
    weights: Sequence[FloatArray],
    grid: Grid,
    input_absmean: Array,
    n_grid: int = 20,
) -> dict[float, float]:
    """What ratios 0, 1/n_grid, …, (n_grid − 1)/n_grid lose, all linears of the site together (AWQ,
    equation 5): `Σ trace(E · hessian · Eᵀ)` with `E = weight − Q(weight · s)/s`.

    input_absmean: [in_features], as `awq_factors` takes it
    Returns the loss of each ratio; infinite where a scale did not fit its dtype.

    Raises:
        NumericalError: no candidate's scales fit their dtype.
    """
    gram = _gram(inputs)
    ratios = [i / n_grid for i in range(n_grid)]
    losses = [_scaled_loss(gram, weights, grid, awq_factors(input_absmean, r)) for r in ratios]
    if not np.min(losses) < float("inf"):
        raise NumericalError("no ratio gives scales that fit", hint="--scale-dtype float32")
    return dict(zip(ratios, losses, strict=True))


def search_clip(
    inputs: FloatArray, weight: FloatArray, grid: Grid, n_grid: int = 20
) -> NDArray[np.float32]:
    """The range of each group with the least error of that group's share of the outputs.

    inputs, weight: already smoothed, `inputs / s` and `weight · s`
    Returns limits float32 [out_features, n_groups]: `absmax · (1 − i/n_grid)` with i from 0 (no
    clipping) to `n_grid/2 − 1`; equal errors go to the wider range. `clip` applies them.
    The authors leave the queries and keys of an attention unclipped.

    Raises:
        InputError: a whole-tensor grid, whose one range no group can change.
        NumericalError: a scale does not fit its dtype.
    """
    if grid.group_size == 0:
        raise InputError("a clip search needs a grid per channel or per group, not per tensor")
    row = replace(grid, group_size=-1, block_rows=1)  # a group by itself
    ratios = [1 - i / n_grid for i in range(max(1, n_grid // 2))]
    starts = grid.starts(weight.shape[1])
    limits = np.zeros((weight.shape[0], grid.n_groups(weight.shape[1])), np.float32)
    for group, (start, stop) in enumerate(pairwise(starts)):
        gram = _gram(inputs[:, start:stop])
        for rows in pieces(0, weight.shape[0], stop - start, _ELEMENTS):
            part = np.ascontiguousarray(weight[rows, start:stop])
            limits[rows, group] = _clip_group(part, gram, row, ratios)
    return limits


def clip(weight: FloatArray, limits: Array, grid: Grid) -> FloatArray:
    """The weight [out_features, in_features] with each group kept within ±limits."""
    bound = limits[:, grid.g_idx(weight.shape[1])].astype(weight.dtype)
    clipped: FloatArray = np.clip(weight, -bound, bound)
    return clipped


def hessian_root(hessian: FloatArray, damp: float = 1e-4) -> FloatArray:
    """R [in_features, in_features] with `R.T @ R / len(R) = hessian + damp · mean(diagonal) · I`:
    what stands for the inputs where only their Hessian is known.

    Raises:
        NotPositiveDefinite: the Hessian is not positive definite even so.
    """
    damped = hessian.copy()
    damped.flat[:: len(damped) + 1] += hessian.dtype.type(damp * hessian.diagonal().mean())
    upper, pivots = ldl_upper(damped, in_place=True)
    root: FloatArray = np.ascontiguousarray((upper * np.sqrt(pivots * len(pivots))).T)
    return root


def _gram(inputs: FloatArray) -> FloatArray:
    """`inputs.T @ inputs / n`, [in_features, in_features]."""
    return inputs.T @ inputs / inputs.dtype.type(len(inputs))


def _losses(error: FloatArray, gram: FloatArray) -> FloatArray:
    """`e · gram · eᵀ` of each row of `error` [rows, in_features]."""
    product = error @ gram
    product *= error
    losses: FloatArray = product.sum(axis=1)
    return losses


def _scaled_loss(
    gram: FloatArray, weights: Sequence[FloatArray], grid: Grid, factors: Factors
) -> float:
    total = 0.0
    for weight in weights:
        for rows in panels(weight, grid):
            part = weight[rows]
            try:
                error = round_to_nearest(part * factors, grid).dequantized()
            except ScaleOverflow:
                return float("inf")
            error /= factors
            total += float(_losses(np.subtract(part, error), gram).sum(dtype=np.float64))
    return total


def _clip_group(
    part: FloatArray, gram: FloatArray, grid: Grid, ratios: Sequence[float]
) -> FloatArray:
    """Best limits [rows] of one group [rows, columns]; grid: of a whole row."""
    absmax = np.abs(part).max(axis=1)
    best: FloatArray = absmax
    least = np.full(len(part), np.inf, part.dtype)
    for ratio in ratios:
        limit = absmax * part.dtype.type(ratio)
        clipped = np.clip(part, -limit[:, None], limit[:, None])
        rounded = round_to_nearest(clipped, grid).dequantized()
        losses = _losses(np.subtract(part, rounded, out=rounded), gram)
        better = losses < least
        least, best = np.where(better, losses, least), np.where(better, limit, best)
    return best
