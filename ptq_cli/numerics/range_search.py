"""Searches for scales of either sign and for offsets of any size, refitted in closed form.

For groups with an offset of their own, `weight ≈ scale · code + offset`, and for those whose scale
may be negative, as levels reach farther on one side. Every function works on any layout, as those
of integers.py do; what comes back is not yet rounded to what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ptq_cli.core.tensors import FloatArray

# Of the whole range, drawn in or a little widened, at both ends or at one.
SEARCH_RATIOS = (1.0, 1.05, 1.02, 0.96, 0.9, 0.75)
REFITS = 2  # of the best of them


def offset_range(
    weight: FloatArray, max_code: int, axis: int, positive: bool
) -> tuple[FloatArray, FloatArray]:
    """Scales and offsets that cover the range of each group.

    weight: columns of each group along `axis`
    positive: whether offsets may be greater than 0; else the range is widened to hold 0
    """
    low, high = _ends(weight, axis, positive)
    return _step(low, high, max_code), low


def search_offsets(
    weight: FloatArray, importance: FloatArray, max_code: int, axis: int, positive: bool
) -> tuple[FloatArray, FloatArray]:
    """Scales and offsets: codes are chosen in each range tried, and the line `scale · code +
    offset` through the weights is fitted to those; the fit with the least weighted squared error,
    whose codes are then chosen and fitted again.

    importance: weight of each column's squared error, broadcastable to `weight`
    """
    weighted = weight * importance
    heaviness = np.broadcast_to(importance, weight.shape).sum(axis)
    mass = weighted.sum(axis)
    ends = _ends(weight, axis, positive)
    best = _step(*ends, max_code), ends[0]
    least = np.full_like(mass, np.inf)

    def attempt(step: FloatArray, low: FloatArray) -> None:
        nonlocal best, least
        codes = weight - np.expand_dims(low, axis)
        codes /= np.expand_dims(nonzero(step), axis)
        np.rint(codes, out=codes)
        codes.clip(0, max_code, out=codes)
        product = (weighted * codes).sum(axis)
        scaled = codes * importance
        total, square = scaled.sum(axis), (scaled * codes).sum(axis)
        scale, offset = _line(heaviness, mass, total, square, product, (step, low))
        if not positive:
            rises = offset > 0
            offset = np.where(rises, 0, offset)
            through_zero = np.divide(product, square, out=step.copy(), where=square > 0)
            scale = np.where(rises, through_zero, scale)
        error = scale * (scale * square + 2 * (offset * total - product))
        error += offset * (offset * heaviness - 2 * mass)  # less what no choice changes
        better = error < least
        best = np.where(better, scale, best[0]), np.where(better, offset, best[1])
        least = np.where(better, error, least)

    for low, high in _ranges(*ends):
        attempt(_step(low, high, max_code), low)
    for _ in range(REFITS):
        attempt(*best)
    return best


def _line(
    heaviness: FloatArray,
    mass: FloatArray,
    total: FloatArray,
    square: FloatArray,
    product: FloatArray,
    otherwise: tuple[FloatArray, FloatArray],
) -> tuple[FloatArray, FloatArray]:
    """Slope and intercept of the weighted least squares fit, from Σw, Σwx, Σwq, Σwq² and Σwqx;
    `otherwise` where all codes are one."""
    determinant = heaviness * square - total * total
    told = determinant > 1e-6 * heaviness * square
    slope = heaviness * product - total * mass
    slope = np.divide(slope, determinant, out=otherwise[0].copy(), where=told)
    intercept = np.divide(mass - slope * total, heaviness, out=otherwise[1].copy(), where=told)
    return slope, intercept


def _ends(weight: FloatArray, axis: int, positive: bool) -> tuple[FloatArray, FloatArray]:
    low, high = weight.min(axis), weight.max(axis)
    return low if positive else np.minimum(low, 0), high


def _ranges(low: FloatArray, high: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
    """The ends of the ranges to try: both drawn in, or one of them."""
    for ratio in SEARCH_RATIOS:
        drawn = low.dtype.type(1 - ratio) * (high - low)
        half = drawn * low.dtype.type(0.5)
        ends = [(low + half, high - half), (low, high - drawn), (low + drawn, high)]
        yield from ends[: 1 if ratio == 1 else 3]


def _step(low: FloatArray, high: FloatArray, max_code: int) -> FloatArray:
    steps = low.dtype.type(max_code)
    return high / steps - low / steps  # two quotients, so that high − low cannot overflow


def signed_range(weight: FloatArray, ends: tuple[float, float], axis: int) -> FloatArray:
    """Scales that bring the greatest weight by size to the level that is farthest from zero.

    ends: the farthest level and the one on the other side, −8 and 7
    """
    return _farthest(weight, axis) / weight.dtype.type(ends[0])


def search_signed(
    weight: FloatArray,
    importance: FloatArray,
    ends: tuple[float, float],
    axis: int,
    nearest: Callable[[FloatArray], FloatArray],
) -> FloatArray:
    """Scales of either sign: levels are chosen with the greatest weight by size at either end, or
    beyond it, and the scale is fitted to those; the fit with the least weighted squared error,
    whose levels are then chosen and fitted again.

    nearest: gives the levels nearest to weights that are divided by a scale
    """
    farthest, weighted = _farthest(weight, axis), weight * importance
    best = farthest / weight.dtype.type(ends[0])
    most = np.full_like(best, -np.inf)

    def attempt(scale: FloatArray) -> None:
        nonlocal best, most
        levels = nearest(weight / np.expand_dims(nonzero(scale), axis))
        product = (weighted * levels).sum(axis)
        levels *= levels
        levels *= importance
        square = levels.sum(axis)
        told = square > 0
        fitted = np.divide(product, square, out=best.copy(), where=told)
        explained = np.where(told, product * fitted, 0)  # of Σ importance · weight²
        better = explained > most
        best, most = np.where(better, fitted, best), np.where(better, explained, most)

    for end in ends:
        for ratio in SEARCH_RATIOS:
            attempt(farthest * weight.dtype.type(ratio / end))
    for _ in range(REFITS):
        attempt(best)
    return best


def _farthest(weight: FloatArray, axis: int) -> FloatArray:
    """The greatest weight of each group by size, with its sign."""
    low, high = weight.min(axis), weight.max(axis)
    farthest: FloatArray = np.where(high > -low, high, low)
    return farthest


def nonzero(scales: FloatArray) -> FloatArray:
    """Scales to divide by: 1 for those that are 0, whose levels mean nothing."""
    return np.where(scales == 0, scales.dtype.type(1), scales)
