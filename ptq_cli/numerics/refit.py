"""Closed forms for better scales and offsets, codes as they are.

A change of a scale by x and of an offset by y changes the error by `−x · u − y · v`, where u are
levels and v ones. The loss, quadratic in the error with curvature S and half its gradient P, then
changes by

    x² uSu + 2 x y uSv + y² vSv − 2 x uP − 2 y vP.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptq_cli.core.tensors import FloatArray


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


def _quotient(a: FloatArray, b: FloatArray) -> FloatArray:
    quotient: FloatArray = np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    return quotient
