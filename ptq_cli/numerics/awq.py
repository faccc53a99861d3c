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
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.numerics.ldl import NotPositiveDefinite, ldl_upper
from ptq_cli.numerics.rounding import (
    ScaleOverflow,
    dequantized_nearest,
    fit_grid,
    round_centred,
    zeros_along,
)
from ptq_cli.numerics.smoothquant import Factors, tied

_PANEL_ROWS = 256  # rows of a weight rounded at a time: the caches hold them
_ELEMENTS = 1 << 18  # weights of one group looked at together by the clip search


@dataclass(frozen=True)
class ScaleSearch:
    """The best AWQ factors of a site.

    ratio: the power of absmean that won; 0 is no scaling
    loss: `Σ trace(E · hessian · Eᵀ)` over the linears, `E = weight − Q(weight · s)/s`
    plain_loss: the same at ratio 0; losses: of every ratio (infinite: a scale did not fit)
    """

    ratio: float
    factors: Factors
    loss: float
    plain_loss: float
    losses: tuple[float, ...]


def awq_factors(input_absmean: Array, ratio: float) -> Factors:
    """`s = max(absmean^ratio, 1e-4)`, then `s / sqrt(max s · min s)`: float32 [in_features].

    input_absmean: [in_features], mean absolute input of each channel

    Raises:
        InputError: ratio outside [0, 1].
        NumericalError: a mean is not finite.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio {ratio} is outside [0, 1]")
    if not np.isfinite(input_absmean).all():
        raise NumericalError("the channels' absolute means hold NaN or infinity")
    scales = np.maximum(input_absmean.astype(np.float64) ** ratio, 1e-4)
    if scales.size == 0:
        return scales.astype(np.float32)
    factors: Factors = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
    return factors


def search_scales(
    inputs: FloatArray,
    weights: Sequence[FloatArray],
    grid: Grid,
    *,
    n_grid: int = 20,
    input_absmean: Array | None = None,
    ties: NDArray[np.integer] | None = None,
) -> ScaleSearch:
    """Factors of ratios 0, 1/n_grid, …, (n_grid − 1)/n_grid with the least loss on a sample, all
    linears of the site together (AWQ, equation 5). Equal losses go to the lower ratio.

    input_absmean: [in_features] of all calibration tokens; the sample's own by default
    ties: channels that share a factor (smoothing.tied); they share the mean

    Raises:
        InputError: n_grid below 1, inputs of the wrong width.
        NumericalError: no candidate's scales fit their dtype.
    """
    if n_grid < 1:
        raise InputError(f"n_grid {n_grid} is below 1")
    absmean = np.abs(inputs).mean(axis=0) if input_absmean is None else input_absmean
    absmean = tied(absmean, ties, "mean")
    for weight in weights:
        _check_width(inputs, weight, absmean)
    ratios = [i / n_grid for i in range(n_grid)]
    sample = _condensed(inputs)
    losses = [_scaled_loss(sample, weights, grid, awq_factors(absmean, r)) for r in ratios]
    best = int(np.argmin(losses))
    if not losses[best] < float("inf"):
        raise NumericalError("no ratio gives scales that fit", hint="--scale-dtype float32")
    factors = awq_factors(absmean, ratios[best])
    return ScaleSearch(ratios[best], factors, losses[best], losses[0], tuple(losses))


def search_clip(
    inputs: FloatArray,
    weight: FloatArray,
    grid: Grid,
    *,
    n_grid: int = 20,
    max_shrink: float = 0.5,
) -> NDArray[np.float32]:
    """The range of each group with the least error of that group's share of the outputs.

    inputs, weight: already smoothed, `inputs / s` and `weight · s`
    Returns limits float32 [out_features, n_groups]: `absmax · (1 − i/n_grid)` with i from 0 (no
    clipping) to `max_shrink · n_grid − 1`; equal errors go to the wider range. `clip` applies them.
    The authors leave the queries and keys of an attention unclipped.

    Raises:
        InputError: a whole-tensor grid, whose one range no group can change; inputs of the wrong
            width; n_grid below 1; max_shrink outside [0, 1).
        NumericalError: a scale does not fit its dtype.
    """
    if grid.group_size == 0:
        raise InputError("a clip search needs a grid per channel or per group, not per tensor")
    if n_grid < 1 or not 0 <= max_shrink < 1:
        raise InputError(f"clip search with n_grid {n_grid} and max_shrink {max_shrink}")
    _check_width(inputs, weight, None)
    ratios = [1 - i / n_grid for i in range(max(1, int(max_shrink * n_grid)))]
    starts = grid.starts(weight.shape[1])
    limits = np.zeros((weight.shape[0], grid.n_groups(weight.shape[1])), np.float32)
    for group, (start, stop) in enumerate(pairwise(starts)):
        sample = _condensed(inputs[:, start:stop])
        step = max(1, _ELEMENTS // (stop - start))
        for top in range(0, weight.shape[0], step):
            part = np.ascontiguousarray(weight[top : top + step, start:stop])
            limits[top : top + step, group] = _clip_group(part, sample, grid, ratios)
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
        NumericalError: the Hessian is not positive definite even so.
    """
    damped = hessian.copy()
    damped.flat[:: len(damped) + 1] += hessian.dtype.type(damp * hessian.diagonal().mean())
    try:
        upper, pivots = ldl_upper(damped)
    except NotPositiveDefinite as error:
        raise NumericalError("a Hessian is not positive definite", hint="raise the damping") from (
            error
        )
    root: FloatArray = np.ascontiguousarray((upper * np.sqrt(pivots * len(pivots))).T)
    return root


def _condensed(inputs: FloatArray) -> tuple[FloatArray, bool]:
    """The smaller of inputs / sqrt(n) [n, in] and `inputs.T @ inputs / n` [in, in], then True."""
    n = max(1, len(inputs))
    if n < inputs.shape[1]:
        return inputs / inputs.dtype.type(np.sqrt(n)), False
    return inputs.T @ inputs / inputs.dtype.type(n), True


def _losses(error: FloatArray, sample: tuple[FloatArray, bool]) -> FloatArray:
    """`e · hessian · eᵀ` of each row of `error` [rows, in]."""
    matrix, is_gram = sample
    if is_gram:
        product = error @ matrix
        product *= error
    else:
        product = error @ matrix.T
        product *= product
    losses: FloatArray = product.sum(axis=1)
    return losses


def _scaled_loss(
    sample: tuple[FloatArray, bool], weights: Sequence[FloatArray], grid: Grid, factors: Factors
) -> float:
    total = 0.0
    for weight in weights:
        step = weight.shape[0] if grid.group_size == 0 else _PANEL_ROWS
        for top in range(0, weight.shape[0], step):
            part = weight[top : top + step]
            try:
                error = dequantized_nearest(part * factors, grid)
            except ScaleOverflow:
                return float("inf")
            error /= factors
            total += float(_losses(np.subtract(part, error), sample).sum(dtype=np.float64))
    return total


def _clip_group(
    part: FloatArray, sample: tuple[FloatArray, bool], grid: Grid, ratios: Sequence[float]
) -> FloatArray:
    """Best limits [rows] of one group [rows, columns]."""
    absmax = np.abs(part).max(axis=1)
    best: FloatArray = absmax
    least = np.full(len(part), np.inf, part.dtype)
    for ratio in ratios:
        limit = absmax * part.dtype.type(ratio)
        clipped = np.clip(part, -limit[:, None], limit[:, None])
        scales, zeros = fit_grid(clipped, grid, 1)
        clipped /= scales[:, None]
        zero = zeros_along(zeros, grid, 1)
        round_centred(clipped, grid.min_code - zero, grid.max_code - zero, out=clipped)
        clipped *= scales[:, None]
        losses = _losses(np.subtract(part, clipped, out=clipped), sample)
        better = losses < least
        least, best = np.where(better, losses, least), np.where(better, limit, best)
    return best


def _check_width(inputs: FloatArray, weight: FloatArray, absmean: Array | None) -> None:
    in_features = weight.shape[1]
    if inputs.shape[1] != in_features:
        raise InputError(f"inputs of width {inputs.shape[1]} do not fit in_features {in_features}")
    if absmean is not None and absmean.shape != (in_features,):
        raise InputError(f"{absmean.size} channel means do not fit in_features {in_features}")
