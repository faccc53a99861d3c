"""Kinds of numbers: all that rounding and the solvers know of what a code means.

`weight ≈ scales · level`. Where a group's scales lie and who shares them says the grid; how scales
are stored, scales.py; what levels there are, one file a kind: integers.py, small_floats.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Codes, FloatArray
from ptq_cli.numerics import integers, small_floats

Limits = tuple[FloatArray, FloatArray] | None


@dataclass(frozen=True)
class Numbers:
    """Pure functions of one kind of numbers.

    fit: scales, as they will be stored, and zeros of each group, from the weight, the grid, the
        axis along which the columns of a group lie, and what weighs each squared error in a search
        (None: the whole range)
    limits: of the levels of groups with these zeros, what `round` wants to know
    round: steps (`weight / scale`) to the nearest level
    write_codes: levels of groups with these zeros as codes, into the last argument
    read_codes: codes of groups with these zeros as levels, in the dtype of the zeros
    round_groups: weights whose scales and zeros are known (which broadcast): into the last two
        arguments, their codes and what they decode to
    """

    fit: Callable[[FloatArray, Grid, int, FloatArray | None], tuple[FloatArray, FloatArray]]
    limits: Callable[[FloatArray, Grid], Limits]
    round: Callable[[FloatArray, Limits, Grid, FloatArray | None], FloatArray]
    write_codes: Callable[[FloatArray, FloatArray, Grid, Codes], Any]
    read_codes: Callable[[Codes, FloatArray, Grid], FloatArray]
    round_groups: Callable[[FloatArray, FloatArray, FloatArray, Grid, Codes, FloatArray], None]


def numbers_of(grid: Grid) -> Numbers:
    """The kind of the grid's numbers."""
    return INTEGERS if grid.integers else SMALL_FLOATS


def _round_integers(
    steps: FloatArray, limits: Limits, grid: Grid, out: FloatArray | None
) -> FloatArray:
    assert limits is not None
    return integers.round_centred(steps, *limits, out=out)


INTEGERS = Numbers(
    fit=integers.fit,
    limits=integers.limits,
    round=_round_integers,
    write_codes=lambda levels, zeros, grid, out: np.add(levels, zeros, out=out, casting="unsafe"),
    read_codes=lambda codes, zeros, grid: codes - zeros,
    round_groups=integers.round_groups,
)

SMALL_FLOATS = Numbers(
    fit=small_floats.fit,
    limits=lambda zeros, grid: None,
    round=lambda steps, limits, grid, out: small_floats.round_levels(steps, grid, out),
    write_codes=lambda levels, zeros, grid, out: small_floats.write_codes(levels, grid, out),
    read_codes=lambda codes, zeros, grid: small_floats.read_codes(codes, grid, zeros.dtype),
    round_groups=lambda weight, scale, zeros, grid, codes, decoded: small_floats.round_groups(
        weight, scale, grid, codes, decoded
    ),
)
