"""Scales (and offsets) that are small integers times a float16 of a super-block: K-quants, IQ4_XS.

`weight ≈ d · n · level`, or `d · n · code − e · m`: n and m are a group's, d and e, both float16,
the super-block's. Here scales are `d · n` and offsets `−e · m`; n and m are found again by
division, exactly, as products of a float16 and eight bits are exact in float32.

Of symmetric grids offsets are zeros and stay so: the sums that would move them are zeros.

What fits a group is found in floats first (range_search.py); d and e bring the greatest of them to
the largest integer. Given those, a group's integers are chosen against its weights as they are
rounded with them. Refits are closed forms in sums that weigh errors by a diagonal or by a matrix:
whoever calls has them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptq_cli.core.grid import SUPER_BLOCK, Grid
from ptq_cli.core.tensors import FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.numerics.numbers import numbers_of
from ptq_cli.numerics.range_search import nonzero
from ptq_cli.numerics.refit import Sums, best_change, best_offset, cost
from ptq_cli.numerics.scales import SCALE_LIMITS, ScaleOverflow

REFITS = 2  # of a weight that is rounded without feedback: what further ones gain is under 0.5 %

_LEAST, _LARGEST = SCALE_LIMITS["float16"]


class Shared(NamedTuple):
    """d and e of super-blocks, as they are stored."""

    scales: FloatArray
    offsets: FloatArray


class Multiples(NamedTuple):
    """Scales and offsets, `d · n` and `−e · m`."""

    scales: FloatArray
    offsets: FloatArray


def fit_groups(
    weight: FloatArray, grid: Grid, axis: int, importance: FloatArray | None
) -> Multiples:
    """Scales and offsets in floats, of the whole range or, with importance, of a search."""
    fitted = numbers_of(grid).fit(weight, grid, axis, importance)
    offsets = np.zeros_like(fitted.scales) if fitted.offsets is None else fitted.offsets
    return Multiples(fitted.scales, offsets)


def share(fitted: Multiples, grid: Grid, axis: int) -> Shared:
    """d and e for the scales and offsets that fit the groups of a super-block, which lie along
    `axis`. (A super-block of nothing but zeros has the least d there is.)

    Raises:
        ScaleOverflow: float16 cannot hold one.
    """
    low, high = limits_of(grid)
    least, most = fitted.scales.min(axis), fitted.scales.max(axis)
    scales = most / high
    if low < 0:  # reaches one farther
        scales = np.where(most > -least, most, least) / low
    return Shared(_stored(scales), _stored(-fitted.offsets.min(axis) / high))


def limits_of(grid: Grid) -> tuple[int, int]:
    """The least and the greatest integer."""
    assert grid.multiples is not None
    return grid.multiples


def _stored(values: FloatArray) -> FloatArray:
    """Rounded to float16, what would vanish to its least value."""
    greatest = float(np.abs(values).max(initial=0))
    if not greatest <= _LARGEST:
        raise ScaleOverflow(
            f"a super-block's scale of {greatest:.4g} does not fit float16 (at most {_LARGEST:g})"
        )
    rounded = values.astype(np.float16).astype(values.dtype)
    least = np.copysign(values.dtype.type(_LEAST), values)
    return np.where(rounded == 0, least, rounded)


def nearest_multiples(fitted: Multiples, shared: Shared, grid: Grid) -> Multiples:
    """The scales and offsets nearest to those that fit, whatever they make of the weights.

    shared: broadcastable to the scales
    """
    low, high = limits_of(grid)
    scales = np.rint(fitted.scales / shared.scales).clip(low, high) * shared.scales
    return Multiples(scales, _offsets(fitted.offsets, shared, high))


def _offsets(wanted: FloatArray, shared: Shared, high: int, move: int = 0) -> FloatArray:
    place = np.rint(wanted / -shared.offsets) + move
    return place.clip(0, high) * -shared.offsets


def best_multiples(
    weight: FloatArray,
    importance: FloatArray,
    fitted: Multiples,
    shared: Shared,
    grid: Grid,
    axis: int,
) -> Multiples:
    """Of the integers nearest to what fits a group and those beside, the pair with which the group
    has the least weighted squared rounding error.

    weight: columns of each group along `axis`; importance: broadcastable to it
    """
    (low, high), numbers = limits_of(grid), numbers_of(grid)
    limits = numbers.limits(np.full((1,) * weight.ndim, zero_of(grid), weight.dtype), grid)
    best = nearest_multiples(fitted, shared, grid)
    place, least = np.rint(best.scales / shared.scales), np.full_like(best.scales, np.inf)
    for own in (0, -1, 1) if grid.own_offsets else (0,):
        offsets = _offsets(fitted.offsets, shared, high, own)
        target = weight - np.expand_dims(offsets, axis)
        for move in (0, -1, 1):
            scales = (place + move).clip(low, high) * shared.scales
            wide = np.expand_dims(scales, axis)
            error = numbers.round(target / nonzero(wide), limits, grid, None)
            error *= wide
            error -= target
            error *= error
            error *= importance
            total = error.sum(axis)
            best = _better(total < least, Multiples(scales, offsets), best)
            least = np.minimum(total, least)
    return best


def zero_of(grid: Grid) -> int:
    """The zero of all groups."""
    return grid.mid_code if grid.integers and grid.sym else 0


def _better(where: FloatArray, one: Multiples, other: Multiples) -> Multiples:
    return Multiples(*(np.where(where, a, b) for a, b in zip(one, other, strict=True)))


def refit_multiples(own: Multiples, shared: Shared, sums: Sums, grid: Grid) -> Multiples:
    """Better integers for the codes as they are: of those about the best scale, each with the best
    offset there is for it, the ones with which the loss falls most; or the same.

    sums: of each group; u are its levels, v ones
    """
    low, high = limits_of(grid)
    here = np.rint(own.scales / shared.scales)
    wanted = np.rint((own.scales + best_change(sums)) / shared.scales)
    best, least = own, np.zeros_like(own.scales)
    for place in (wanted, wanted - 1, wanted + 1, here):
        multiple = place.clip(low, high)
        scales = multiple * shared.scales
        change = scales - own.scales
        offsets = _offsets(own.offsets + best_offset(sums, change), shared, high)
        added = cost(sums, change, offsets - own.offsets)
        better = (added < least) & (multiple != 0)  # 0 would leave the codes without a meaning
        best = _better(better, Multiples(scales, offsets), best)
        least = np.where(better, added, least)
    return best


def refit_shared(own: Shared, sums: Sums, grid: Grid) -> Shared:
    """Better d and e for codes and integers as they are, or the same: the closed form, rounded.

    sums: of the super-block; u are levels times their group's n, v its −m
    """
    scales = _moved(own.scales, best_change(sums))
    change = scales - own.scales
    offsets = np.maximum(_moved(own.offsets, best_offset(sums, change)), _LEAST)
    falls = cost(sums, change, offsets - own.offsets) < 0
    if grid.own_offsets:
        falls &= scales > 0
    return Shared(np.where(falls, scales, own.scales), np.where(falls, offsets, own.offsets))


def _moved(values: FloatArray, change: FloatArray) -> FloatArray:
    """A float16 after a change, never 0 nor beyond what it holds: a refit is no error."""
    return _stored((values + change).clip(-_LARGEST, _LARGEST))


def round_rows(
    weight: FloatArray, into: QuantizedWeight, decoded: FloatArray, importance: FloatArray | None
) -> None:
    """Round rows, each super-block by itself, into `into`; `decoded` receives what they decode to.

    weight: [rows, columns]; importance: broadcastable to it, or None for the plain range
    """
    grid = into.grid
    shape = (-1, weight.shape[1] // SUPER_BLOCK, SUPER_BLOCK // grid.group_size, grid.group_size)
    part = weight.reshape(shape)
    weights = None if importance is None else importance.reshape(shape)
    fitted = fit_groups(part, grid, -1, weights)
    shared = share(fitted, grid, -1)
    if weights is None:
        own = nearest_multiples(fitted, _of_groups(shared), grid)
        levels = _nearest_levels(part, own, grid)
    else:
        own = best_multiples(part, weights, fitted, _of_groups(shared), grid, -1)
        levels = _nearest_levels(part, own, grid)
        for _ in range(REFITS):
            own, shared = _refit(part, weights, levels, own, shared, grid)
            levels = _nearest_levels(part, own, grid)
        own, shared = _unshrunken(part, weights, levels, own, shared)
    store(own, shared, grid, into)
    zero = np.full((), zero_of(grid), levels.dtype)
    numbers_of(grid).write_codes(levels, zero, grid, into.codes.reshape(part.shape))
    levels *= own.scales[..., None]
    levels += own.offsets[..., None]
    decoded.reshape(part.shape)[...] = levels


def _of_groups(shared: Shared) -> Shared:
    return Shared(shared.scales[..., None], shared.offsets[..., None])


def _under(moved: Shared, own: Multiples, shared: Shared) -> Multiples:
    """The same integers under another d and e. own: under those of `shared`"""
    before, after = _of_groups(shared), _of_groups(moved)
    return Multiples(
        own.scales / before.scales * after.scales, own.offsets / before.offsets * after.offsets
    )


def _nearest_levels(weight: FloatArray, own: Multiples, grid: Grid) -> FloatArray:
    """Levels nearest to `weight` [rows, super-blocks, groups, columns] on these scales."""
    numbers = numbers_of(grid)
    steps = weight - own.offsets[..., None]
    steps /= nonzero(own.scales)[..., None]
    limits = numbers.limits(np.full((1,) * steps.ndim, zero_of(grid), steps.dtype), grid)
    return numbers.round(steps, limits, grid, steps)


def _refit(
    weight: FloatArray,
    importance: FloatArray,
    levels: FloatArray,
    own: Multiples,
    shared: Shared,
    grid: Grid,
) -> tuple[Multiples, Shared]:
    """d and e, then the integers, for the levels as they are; `importance` weighs errors."""
    n, m = own.scales / _of_groups(shared).scales, own.offsets / _of_groups(shared).offsets
    error = weight - levels * own.scales[..., None]
    error -= own.offsets[..., None]
    error *= importance
    weighed = levels * importance
    heaviness = np.broadcast_to(importance, weight.shape).sum(-1)
    moves = heaviness if grid.own_offsets else np.zeros_like(heaviness)
    uu, up, vp = (weighed * levels).sum(-1), (error * levels).sum(-1), error.sum(-1)
    uv = weighed.sum(-1)
    of_block = Sums(*(x.sum(-1) for x in (n * n * uu, n * m * uv, m * m * moves, n * up, m * vp)))
    better = refit_shared(shared, of_block, grid)
    moved = _under(better, own, shared)
    change, other = moved.scales - own.scales, moved.offsets - own.offsets
    up, vp = up - change * uu - other * uv, vp - change * uv - other * heaviness
    sums = Sums(uu, uv, moves, up, vp)
    return refit_multiples(moved, _of_groups(better), sums, grid), better


def _unshrunken(
    weight: FloatArray,
    importance: FloatArray,
    levels: FloatArray,
    own: Multiples,
    shared: Shared,
) -> tuple[Multiples, Shared]:
    """d and e such that `Σ importance · weight · rounded` is `Σ importance · weight²`.

    A least squares fit is shorter than what it fits, by the share of its error; the outputs of all
    layers would be, too. A little more error of the weights is far less of the predictions
    (docs/maths.md has figures).
    """
    weighed = weight * importance
    decoded = levels * own.scales[..., None]
    decoded += own.offsets[..., None]
    wanted, found = (np.einsum("rbgk,rbgk->rb", weighed, x) for x in (weight, decoded))
    stretch = np.divide(wanted, found, out=np.ones_like(wanted), where=found > 0.5 * wanted)
    scales, offsets = (_stored((x * stretch).clip(-_LARGEST, _LARGEST)) for x in shared)
    moved = Shared(scales, offsets)
    return _under(moved, own, shared), moved


def store(own: Multiples, shared: Shared, grid: Grid, into: QuantizedWeight) -> None:
    """Put scales and offsets of all groups of some rows into a rounded weight, as integers and
    their super-blocks' float16.

    own: [rows, super-blocks, groups]; shared: [rows, super-blocks]
    """
    assert into.super_scales is not None
    wide = _of_groups(shared)
    into.super_scales[:] = shared.scales
    into.scales.reshape(own.scales.shape)[:] = np.rint(own.scales / wide.scales)
    into.zeros.fill(zero_of(grid))
    if into.offsets is not None and into.super_offsets is not None:
        into.super_offsets[:] = shared.offsets
        into.offsets.reshape(own.offsets.shape)[:] = np.rint(own.offsets / -wide.offsets)
