"""Folding the factors of smoothing into weights: the float model computes what it did before.

A site's inputs are to be divided by s, float [in_features], and the columns of its linears
multiplied by it. Arithmetic is in float32 (float64 for float64 arrays), whatever the tensors'
dtype.

A norm is folded first and rounded to the dtype it is stored in; the columns are then scaled by what
the stored gain really divides by, `old gain / stored gain`. So rounding the gain costs nothing,
however coarse it is where the gain is stored less one (Gemma: steps of 1/256 in BF16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.models.sites import Norm, Preceding, Rows, Site
from ptq_cli.numerics.smoothquant import check_factors


def fold_into_norm(gain: Array, factors: Array, plus_one: bool = False) -> FloatArray:
    """Divide a norm's gain, or its bias, by the factors: all [channels].

    plus_one (Gemma): the gain is 1 + what is stored, so that becomes `(1 + gain)/s − 1`.
    """
    work = _working(gain)
    divisor = factors.astype(work.dtype)
    return (1 + work) / divisor - 1 if plus_one else work / divisor


def fold_into_linear_rows(
    weight: Array, factors: Array, rows: Rows, transposed: bool = False
) -> FloatArray:
    """Divide the outputs of a linear that feed a site by the site's factors.

    weight: [out_features, in_features] (transposed: the other way round), or a bias [out_features]
    factors: [in_features of the site]; rows: which output feeds which input

    Raises:
        InputError: outputs that do not exist, or inputs fed by one output with unequal factors.
    """
    work = _working(weight)
    divisor = row_divisor(work.shape[1 if transposed else 0], factors, rows).astype(work.dtype)
    by_row = work.ndim == 2 and not transposed
    folded: FloatArray = work / (divisor[:, None] if by_row else divisor)
    return folded


def row_divisor(outputs: int, factors: Array, rows: Rows) -> FloatArray:
    """What each output is divided by, [outputs]."""
    index = rows.index(len(factors))
    if index.size and int(index.max()) >= outputs:
        raise InputError(f"{outputs} outputs do not feed {len(factors)} inputs")
    divisor = np.ones(outputs, factors.dtype)
    divisor[index] = factors
    if not np.array_equal(divisor[index], factors):
        raise InputError("inputs fed by the same output need the same smoothing factor")
    return divisor


def scale_columns(weight: Array, factors: Array, transposed: bool = False) -> FloatArray:
    """Multiply each column of a weight by its input's factor.

    weight: [out_features, in_features] (transposed: the other way round); factors: [in_features]
    """
    work = _working(weight)
    scale = factors.astype(work.dtype)
    scaled: FloatArray = work * (scale[:, None] if transposed else scale)
    return scaled


def settle_factors(
    site: Site, tensors: Mapping[str, Array], factors: Array
) -> tuple[FloatArray, tuple[str, ...]]:
    """The factors that a fold can really use, [in_features], and notes on those it cannot.

    A norm's gain is stored rounded, and what it then divides by is what the columns have to be
    multiplied by. A gain that would be stored as 0 stays as it is.
    tensors: at least the feeder's

    Raises:
        InputError: factors of the wrong length.
        NumericalError: a factor is not a positive number, or the gain does not fit its dtype.
    """
    check_factors(factors, site.in_features)
    if not isinstance(site.feeder, Norm):
        return factors, ()
    weight = tensors[site.feeder.weight]
    exact = fold_into_norm(weight, factors, site.feeder.plus_one)
    new = as_stored(site.feeder.weight, exact, weight.dtype)
    old_gain, new_gain = _gain(site.feeder, _working(weight)), _gain(site.feeder, _working(new))
    lost = (old_gain != 0) & (new_gain == 0)
    new_gain = np.where(lost, old_gain, new_gain)
    wanted = factors.astype(old_gain.dtype)
    used = np.divide(old_gain, new_gain, out=wanted, where=new_gain != 0)
    count = int(lost.sum())
    note = f"{site.feeder.weight}: {count} channels not smoothed, their gain would be stored as 0"
    return used, (note,) if count else ()


def fold_tensor(name: str, values: Array, folds: Sequence[tuple[Site, Array]]) -> FloatArray:
    """One tensor after the folds of sites that it belongs to, one after the other; not rounded.

    folds: sites with their settled factors

    Raises:
        InputError: factors that do not fit; a tensor that belongs to none of the sites.
    """
    for site, factors in folds:
        values = _folded(name, values, site, factors)
    return _working(values)


def _folded(name: str, values: Array, site: Site, factors: Array) -> FloatArray:
    for linear in site.linears:
        if linear.tensor == name:
            return scale_columns(values, factors, linear.transposed)
    feeder = site.feeder
    if feeder is None or name not in feeder.tensors:
        raise InputError(f"{name} does not belong to site {site.name}")
    is_weight = name == feeder.weight
    if isinstance(feeder, Preceding):
        return fold_into_linear_rows(values, factors, feeder.rows, feeder.transposed and is_weight)
    return fold_into_norm(values, factors, feeder.plus_one and is_weight)


def inputs_after(
    site: Site, before: Mapping[str, Array], after: Mapping[str, Array], inputs: Array, used: Array
) -> FloatArray:
    """What the linears see once the site is folded, from what they saw: [n, in] → float64 [n, in].

    Behind a norm it is worked out from the stored gains and biases, `(x − b)·g'/g + b'`, so that
    their rounding shows; behind a linear it is `x / used`.
    """
    values, norm = inputs.astype(np.float64), site.feeder
    if not isinstance(norm, Norm):
        return values / used.astype(np.float64)
    old, new = (_gain(norm, tensors[norm.weight].astype(np.float64)) for tensors in (before, after))
    ratio = np.divide(new, old, out=np.zeros_like(old), where=old != 0)
    if norm.bias is None:
        return values * ratio
    bias, moved = (tensors[norm.bias].astype(np.float64) for tensors in (before, after))
    shifted: FloatArray = (values - bias) * ratio + moved
    return shifted


def as_stored(name: str, values: FloatArray, dtype: np.dtype[Any]) -> Array:
    """`values` in the dtype of the checkpoint.

    Raises:
        NumericalError: a value is beyond the dtype's range, or not finite.
    """
    with np.errstate(over="ignore", under="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        greatest = float(np.abs(values).max())
        raise NumericalError(f"{name}: {greatest:.4g} after smoothing does not fit {dtype.name}")
    return stored


def _gain(norm: Norm, stored: FloatArray) -> FloatArray:
    return stored + (1 if norm.plus_one else 0)


def _working(values: Array) -> FloatArray:
    return values if values.dtype == np.float64 else values.astype(np.float32)
