"""Closed forms for better scales and offsets, codes as they are.

A change of a scale by x and of an offset by y changes the error by `−x · u − y · v`, where u are
levels and v ones. The loss, quadratic in the error with curvature S and half its gradient P, then
changes by

    x² uSu + 2 x y uSv + y² vSv − 2 x uP − 2 y vP.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import FloatArray
from ptq_cli.numerics.scales import SCALE_LIMITS, round_offsets, round_scales


class Sums(NamedTuple):
    """uSu, uSv, vSv, uP and vP; of offsets that stay as they are, vSv is 0."""

    uu: FloatArray
    uv: FloatArray
    vv: FloatArray
    up: FloatArray
    vp: FloatArray


def best_change(sums: Sums) -> FloatArray:
    """Of the scale, where the offset moves with it."""
    determinant = sums.uu * sums.vv - sums.uv * sums.uv
    both = determinant > 1e-6 * sums.uu * sums.vv
    alone = _quotient(sums.up, sums.uu)
    change: FloatArray = np.divide(
        sums.up * sums.vv - sums.uv * sums.vp, determinant, out=alone, where=both
    )
    return change


def best_offset(sums: Sums, change: FloatArray) -> FloatArray:
    """Of the offset, given the scale's change."""
    return _quotient(sums.vp - change * sums.uv, sums.vv)


def cost(sums: Sums, change: FloatArray, other: FloatArray) -> FloatArray:
    """What changes of the scale and of the offset add to the loss."""
    added = change * (change * sums.uu + 2 * (other * sums.uv - sums.up))
    added += other * (other * sums.vv - 2 * sums.vp)
    return added


def better_scale(
    scale: FloatArray, slope: FloatArray, curvature: FloatArray, grid: Grid
) -> FloatArray:
    """The best scale alone, `scale + uP / uSu`, of the same sign and as it is stored; or the same
    where the loss does not fall.

    slope, curvature: uP, uSu
    """
    moved = scale + np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
    largest = SCALE_LIMITS[grid.scale_dtype][1] / grid.global_scale
    moved = moved.clip(-largest, largest)  # a refit is no error
    same_side = (np.signbit(moved) == np.signbit(scale)) & (moved != 0)
    moved = np.where(same_side, moved, scale)
    moved = np.copysign(round_scales(np.abs(moved), grid), moved)
    delta = moved - scale
    falls = delta * (2 * slope - delta * curvature) > 0
    better: FloatArray = np.where(falls, moved, scale)
    return better


def better_pair(
    scale: FloatArray, offset: FloatArray, sums: Sums, grid: Grid
) -> tuple[FloatArray, FloatArray]:
    """The best positive scale and its best offset, as they are stored; or the same."""
    largest = SCALE_LIMITS[grid.scale_dtype][1]
    moved: FloatArray = scale + best_change(sums)
    moved = round_scales(np.where(moved > 0, np.minimum(moved, largest), scale), grid)
    other: FloatArray = offset + best_offset(sums, moved - scale)
    other = round_offsets(other.clip(-largest, largest), grid)
    falls = cost(sums, moved - scale, other - offset) < 0
    return np.where(falls, moved, scale), np.where(falls, other, offset)


def _quotient(a: FloatArray, b: FloatArray) -> FloatArray:
    quotient: FloatArray = np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    return quotient
