"""IQ4_NL's table as levels: `weight ≈ scales · level`.

No two levels lie symmetric to zero, so a scale may be negative. Midpoints of neighbours are
multiples of ½: the nearest level of a value is that of the half it lies in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptq_cli.core.levels import IQ4_NL
from ptq_cli.core.tensors import Codes, FloatArray
from ptq_cli.numerics.range_search import nonzero

ENDS = (float(IQ4_NL[0]), float(IQ4_NL[-1]))

_LEAST = int(IQ4_NL[0])
_HALVES = np.arange(2 * _LEAST, 2 * int(IQ4_NL[-1]) + 1) / 2 + 0.25
_NEAREST_CODE = np.abs(_HALVES[:, None] - IQ4_NL).argmin(1)
_NEAREST = IQ4_NL[_NEAREST_CODE]
_CODE = _NEAREST_CODE[::2].astype(np.uint8)  # of the level that is `_LEAST` + n, at n


def round_levels(steps: FloatArray, out: FloatArray | None = None) -> FloatArray:
    """The levels nearest to `steps = weight / scale`."""
    halves = steps.clip(*ENDS)
    halves *= 2
    np.floor(halves, out=halves)
    halves -= 2 * _LEAST
    levels = _NEAREST.astype(steps.dtype, copy=False)
    found: FloatArray = np.take(levels, halves.astype(np.intp), out=out, mode="clip")
    return found


def write_codes(levels: FloatArray, out: Codes) -> None:
    """The codes of levels."""
    places = levels.astype(np.intp)
    places -= _LEAST
    np.take(_CODE, places, out=out, mode="clip")


def read_codes(codes: Codes, dtype: np.dtype[Any]) -> FloatArray:
    """The levels that codes mean."""
    levels: FloatArray = IQ4_NL[codes].astype(dtype, copy=False)
    return levels


def round_groups(weight: FloatArray, scale: FloatArray, codes: Codes, decoded: FloatArray) -> None:
    """Codes and what they decode to of weights whose scales are known."""
    levels = np.divide(weight, nonzero(scale), out=decoded)
    round_levels(levels, out=levels)
    write_codes(levels, codes)
    levels *= scale
