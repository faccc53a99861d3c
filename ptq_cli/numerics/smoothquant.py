"""SmoothQuant: moving the spread of the inputs into the weights, channel by channel.

With factors s, `inputs @ weight.T = (inputs / s) @ (weight · s).T`. Divided by

    s_j = max|X_j|^alpha / max|W_j|^(1 − alpha)

the inputs lose their outlying channels and the weights take them over (Xiao et al., arXiv
2211.10438, equation 4; the maximum over W runs over the rows of every linear that shares the
inputs). alpha = 1 puts the whole difficulty into the weights, alpha = 0 into the inputs.

Shapes throughout: inputs [n_tokens, in_features]; weights a sequence of [out_features,
in_features], one for each linear of the site; factors float32 [in_features].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.numerics.activations import rounded_inputs
from ptq_cli.numerics.parallel import strips
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.scales import ScaleOverflow

# Channels quieter than this share of the site's loudest are treated as if they were this loud:
# a channel that calibration never saw would otherwise be divided by nothing.
EPSILON = 1e-5

# 0, 0.05, …, 1.
ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))

_PANEL_ROWS = 256  # rows of a weight rounded at a time: the caches hold them

Factors = NDArray[np.float32]


def weights_absmax(weights: Sequence[Array]) -> NDArray[np.float32]:
    """`max_i |W_ij|` over the rows of all weights: float32 [in_features]."""
    columns = [np.abs(weight).max(axis=0, initial=0) for weight in weights]
    result: NDArray[np.float32] = np.max(columns, axis=0).astype(np.float32)
    return result


def smooth_factors(input_absmax: Array, weight_absmax: Array, alpha: float) -> Factors:
    """`s_j = max|X_j|^alpha / max|W_j|^(1 − alpha)`, float32 [in_features].

    input_absmax, weight_absmax: [in_features], in the units of the inputs and of the weights;
        alpha: 0 to 1
    Floors: each of the two is taken as at least 1e-5 times its own greatest value. A site whose
    inputs or weights are all zero has nothing to balance and gets ones.

    Raises:
        NumericalError: statistics that are not finite, or factors float32 cannot hold.
    """
    if not (np.isfinite(input_absmax).all() and np.isfinite(weight_absmax).all()):
        raise NumericalError("the channels' absolute maxima hold NaN or infinity")
    if not (input_absmax.any() and weight_absmax.any()):
        return np.ones(input_absmax.shape, np.float32)
    inputs, weights = _floored(input_absmax), _floored(weight_absmax)
    with np.errstate(over="ignore", under="ignore"):
        factors = (inputs**alpha / weights ** (1 - alpha)).astype(np.float32)
    check_factors(factors, len(factors))
    return factors


def check_factors(factors: Array, in_features: int) -> None:
    """Raises:
    InputError: factors are not [in_features].
    NumericalError: a factor is not a positive, normal float32.
    """
    if factors.shape != (in_features,):
        raise InputError(
            f"smoothing factors of shape {factors.shape} do not fit in_features {in_features}"
        )
    if not (np.isfinite(factors).all() and (factors >= np.finfo(np.float32).tiny).all()):
        raise NumericalError("a smoothing factor is not a positive float32 number")


def tied(values: Array, ties: NDArray[np.integer] | None, how: str = "max") -> Array:
    """Give channels that must share a factor the same statistic: [in_features] → [in_features].

    ties: int [in_features]; channels with equal numbers share one factor, as those of o_proj do
        that read the same row of v_proj; None: every channel has its own
    how: "max" or "mean" over the channels that share
    """
    if ties is None:
        return values
    total = np.zeros(int(ties.max()) + 1 if ties.size else 0, np.float64)
    if how == "max":
        np.maximum.at(total, ties, values)
    else:
        np.add.at(total, ties, values)
        total /= np.maximum(np.bincount(ties), 1)
    shared: Array = total[ties].astype(values.dtype)
    return shared


def alpha_errors(
    inputs: FloatArray,
    weights: Sequence[FloatArray],
    grid: Grid,
    activation: Activation | None,
    ties: NDArray[np.integer] | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> dict[float | None, float]:
    """`Σ‖Y − Ŷ‖² / Σ‖Y‖²` over the linears, `Y = inputs @ weight.T` and Ŷ the product of `inputs /
    factors` and `weight · factors`, both rounded to nearest: without smoothing (None), then for
    every alpha.

    Factors are tried out on inputs that they were not made from: maxima of the first half of the
    sample, errors on the second. Maxima fit their own inputs so well that on the same rows alpha
    near 1 always looks best, and on others it is often worse than no smoothing.

    inputs: float32 sample [n, in_features]; with a single row, it serves as both halves
    activation: how inputs are rounded, each with scales of its own; None: not at all
    ties: channels that share a factor (see `tied`)
    Returns the error of each candidate; infinite where a scale did not fit its dtype.

    Raises:
        NumericalError: no candidate's scales fit their dtype, or inputs are not finite.
    """
    half = len(inputs) // 2
    seen, tried = (inputs[:half], inputs[half:]) if half else (inputs, inputs)
    loud, heavy = tied(np.abs(seen).max(axis=0), ties), tied(weights_absmax(weights), ties)
    products = [tried @ weight.T for weight in weights]
    errors: dict[float | None, float] = {}
    for alpha in (None, *alphas):
        factors = np.ones_like(loud) if alpha is None else smooth_factors(loud, heavy, alpha)
        try:
            errors[alpha] = _relative(tried, weights, products, grid, activation, factors)
        except ScaleOverflow:
            errors[alpha] = float("inf")
    if not min(errors.values()) < float("inf"):
        raise NumericalError("no smoothing gives scales that fit", hint="--scale-dtype float32")
    return errors


def function_change(
    inputs: FloatArray,
    weights: Sequence[FloatArray],
    smoothed_inputs: FloatArray,
    smoothed_weights: Sequence[FloatArray],
) -> float:
    """`sqrt(Σ‖Y − Y'‖² / Σ‖Y‖²)` of the float outputs before and after smoothing, in float64: what
    folding has done to the function, storing it in BF16 included."""
    change = total = 0.0
    before, after = inputs.astype(np.float64), smoothed_inputs.astype(np.float64)
    for weight, smoothed in zip(weights, smoothed_weights, strict=True):
        for rows in strips(weight.shape[0], _PANEL_ROWS):
            product = before @ weight[rows].T.astype(np.float64)
            total += _squares(product)
            product -= after @ smoothed[rows].T.astype(np.float64)
            change += _squares(product)
    return float(np.sqrt(_ratio(change, total)))


def channel_importance(input_absmax: Array, weights: Sequence[Array]) -> NDArray[np.float32]:
    """`max_batch |x_j| · mean_i |W_ij|`, float32 [in_features]; the mean runs over the rows of all
    weights. In units of the outputs: how far channel j can move them."""
    rows = sum(weight.shape[0] for weight in weights)
    if rows == 0:
        return np.zeros(input_absmax.shape, np.float32)
    total = sum(np.abs(weight).sum(axis=0, dtype=np.float64) for weight in weights)
    importance: NDArray[np.float32] = (input_absmax * (total / rows)).astype(np.float32)
    return importance


def _floored(absmax: Array) -> NDArray[np.float64]:
    values = absmax.astype(np.float64)
    floored: NDArray[np.float64] = np.maximum(values, EPSILON * values.max())
    return floored


def panels(weight: FloatArray, grid: Grid) -> list[slice]:
    """Rows of a weight that are rounded at a time: as many as the caches hold; all, where one scale
    is theirs."""
    rows = weight.shape[0]
    return strips(rows, max(1, rows) if grid.group_size == 0 else _PANEL_ROWS)


def _relative(
    inputs: FloatArray,
    weights: Sequence[FloatArray],
    products: Sequence[FloatArray],
    grid: Grid,
    activation: Activation | None,
    factors: Factors,
) -> float:
    """The error with these factors; products: the exact outputs of each linear."""
    smoothed = inputs / factors
    if activation is not None:
        smoothed = rounded_inputs(smoothed, activation)
    change = total = 0.0
    for weight, product in zip(weights, products, strict=True):
        for rows in panels(weight, grid):
            rounded = round_to_nearest(weight[rows] * factors, grid).dequantized()
            change += _squares(product[:, rows] - smoothed @ rounded.T)
        total += _squares(product)
    return _ratio(change, total)


def _squares(values: FloatArray) -> float:
    return float(np.vdot(values, values))


def _ratio(change: float, total: float) -> float:
    if total == 0:
        return 0.0 if change == 0 else float("inf")
    return change / total
