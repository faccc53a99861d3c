"""Kinds of numbers: all that rounding and the solvers know of what a code means.

`weight ≈ scales · level`, or `scales · level + offsets`. Where a group's scales lie and who shares
them says the grid; how scales are stored, scales.py, and where they are multiples of others,
super_blocks.py; what levels there are, one file a kind: integers.py, small_floats.py, iq4_nl.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.tensors import Codes, FloatArray
from ptq_cli.numerics import integers, iq4_nl, range_search, small_floats
from ptq_cli.numerics.scales import round_offsets, round_scales

Limits = tuple[FloatArray, FloatArray] | None


class Scales(NamedTuple):
    """Scales, zeros and offsets of groups, one each; without offsets of their own: None."""

    scales: FloatArray
    zeros: FloatArray
    offsets: FloatArray | None = None


@dataclass(frozen=True)
class Numbers:
    """Pure functions of one kind of numbers.

    fit: scales, zeros and offsets of each group, from the weight, the grid, the axis along which
        the columns of a group lie, and what weighs each squared error in a search (None: the whole
        range); as they will be stored, but where they become multiples: as they fit best
    limits: of the levels of groups with these zeros, what `round` wants to know
    round: steps (`weight / scale`) to the nearest level
    write_codes: levels of groups with these zeros as codes, into the last argument
    read_codes: codes of groups with these zeros as levels, in the dtype of the zeros
    round_groups: weights whose scales and zeros are known (which broadcast): into the last two
        arguments, their codes and what they decode to
    """

    fit: Callable[[FloatArray, Grid, int, FloatArray | None], Scales]
    limits: Callable[[FloatArray, Grid], Limits]
    round: Callable[[FloatArray, Limits, Grid, FloatArray | None], FloatArray]
    write_codes: Callable[[FloatArray, FloatArray, Grid, Codes], Any]
    read_codes: Callable[[Codes, FloatArray, Grid], FloatArray]
    round_groups: Callable[[FloatArray, FloatArray, FloatArray, Grid, Codes, FloatArray], None]


def numbers_of(grid: Grid) -> Numbers:
    """The kind of the grid's numbers."""
    if grid.levels == "iq4_nl":
        return IQ4
    if not grid.integers:
        return SMALL_FLOATS
    if grid.own_offsets:
        return WITH_OFFSETS
    return INTEGERS if grid.multiples is None else SIGNED


def _round_integers(
    steps: FloatArray, limits: Limits, grid: Grid, out: FloatArray | None
) -> FloatArray:
    assert limits is not None
    return integers.round_centred(steps, *limits, out=out)


def _fit_offsets(
    weight: FloatArray, grid: Grid, axis: int, importance: FloatArray | None
) -> Scales:
    """Integers with offsets of their own, which multiples subtract: those are 0 or less."""
    stored = grid.multiples is None
    if importance is None:
        scales, offsets = range_search.offset_range(weight, grid.max_code, axis, stored)
    else:
        scales, offsets = range_search.search_offsets(
            weight, importance, grid.max_code, axis, stored
        )
    if stored:
        scales, offsets = round_scales(scales, grid), round_offsets(offsets, grid)
    return Scales(scales, np.zeros_like(scales), offsets)


def _fit_signed(weight: FloatArray, grid: Grid, axis: int, importance: FloatArray | None) -> Scales:
    """Levels that reach farther on one side than on the other: scales of either sign."""
    zero, ends = (0, iq4_nl.ENDS)
    if grid.integers:
        zero, ends = grid.mid_code, (-float(grid.mid_code), float(grid.mid_code - 1))

    def nearest(steps: FloatArray) -> FloatArray:
        if grid.integers:
            return integers.round_centred(steps, int(ends[0]), int(ends[1]))
        return iq4_nl.round_levels(steps)

    if importance is None:
        scales = range_search.signed_range(weight, ends, axis)
    else:
        scales = range_search.search_signed(weight, importance, ends, axis, nearest)
    if grid.multiples is None:  # no level is 0: zeros have a scale of 0
        stored = np.copysign(round_scales(np.abs(scales), grid), scales)
        scales = np.where(scales == 0, 0, stored)
    return Scales(scales, np.full_like(scales, zero))


INTEGERS = Numbers(
    fit=lambda weight, grid, axis, weights: Scales(*integers.fit(weight, grid, axis, weights)),
    limits=integers.limits,
    round=_round_integers,
    write_codes=lambda levels, zeros, grid, out: np.add(levels, zeros, out=out, casting="unsafe"),
    read_codes=lambda codes, zeros, grid: codes - zeros,
    round_groups=integers.round_groups,
)

WITH_OFFSETS = replace(INTEGERS, fit=_fit_offsets)

SIGNED = replace(INTEGERS, fit=_fit_signed)

IQ4 = Numbers(
    fit=_fit_signed,
    limits=lambda zeros, grid: None,
    round=lambda steps, limits, grid, out: iq4_nl.round_levels(steps, out),
    write_codes=lambda levels, zeros, grid, out: iq4_nl.write_codes(levels, out),
    read_codes=lambda codes, zeros, grid: iq4_nl.read_codes(codes, zeros.dtype),
    round_groups=lambda weight, scale, zeros, grid, codes, decoded: iq4_nl.round_groups(
        weight, scale, codes, decoded
    ),
)

SMALL_FLOATS = Numbers(
    fit=lambda weight, grid, axis, weights: Scales(*small_floats.fit(weight, grid, axis, weights)),
    limits=lambda zeros, grid: None,
    round=lambda steps, limits, grid, out: small_floats.round_levels(steps, grid, out),
    write_codes=lambda levels, zeros, grid, out: small_floats.write_codes(levels, grid, out),
    read_codes=lambda codes, zeros, grid: small_floats.read_codes(codes, grid, zeros.dtype),
    round_groups=lambda weight, scale, zeros, grid, codes, decoded: small_floats.round_groups(
        weight, scale, grid, codes, decoded
    ),
)
