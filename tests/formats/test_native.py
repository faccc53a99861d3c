"""What the native format's metadata says of a grid."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Contents
from ptq_cli.errors import InputError
from ptq_cli.formats import ptq
from ptq_cli.numerics.rounding import grid_by_zeros, round_to_nearest
from tests.formats.cases import layer

MIRRORED = layer(shape=(8, 64))
MIRRORED = replace(MIRRORED, grid=replace(MIRRORED.grid, mirrored=True))


def read(own: Layer, **changed: Any) -> Layer:
    """The layer that is read from what is written of `own`, entries `changed` (None: left out)."""
    metadata = json.loads(json.dumps(ptq.FORMAT.metadata([own])))
    for key, value in changed.items():
        metadata[own.module].pop(key, None)
        metadata[own.module] |= {} if value is None else {key: value}
    specs = {spec.name: spec for spec in ptq.FORMAT.specs(own)}
    (found,) = ptq.FORMAT.layers(Contents(metadata, {}, specs, lambda name: np.empty(0)))
    return found


def test_mirrored_groups_come_back() -> None:
    found = read(MIRRORED)
    assert found.grid == MIRRORED.grid
    rounded = round_to_nearest(np.random.default_rng(0).normal(size=(8, 64)), found.grid)
    assert set(rounded.zeros.flat) == {7, 8}
    back = ptq.FORMAT.decode(found, ptq.FORMAT.encode(MIRRORED, rounded))
    np.testing.assert_array_equal(back.codes, rounded.codes)
    np.testing.assert_array_equal(back.zeros, rounded.zeros)
    np.testing.assert_array_equal(back.dequantized(), rounded.dequantized())


def test_folders_from_before_have_no_mirrored_groups() -> None:
    """Their entries do not say it, and entries of grids without such groups still do not."""
    assert "mirrored" not in ptq.FORMAT.metadata([layer()])[layer().module]
    assert not read(MIRRORED, mirrored=None).grid.mirrored


@pytest.mark.parametrize("changed", [{"sym": False}, {"narrow_range": True}])
def test_no_other_grid_is_mirrored(changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is damaged"):
        read(MIRRORED, **changed)


@pytest.mark.parametrize(
    ("bits", "zeros", "sym", "mirrored"),
    [
        (4, [8, 8], True, False),
        (4, [8, 7], True, True),
        (4, [7, 7], False, False),
        (4, [8, 9], False, False),
        (3, [4, 3], False, False),
        (3, [4, 4], True, False),
    ],
)
def test_zeros_say_what_a_layout_does_not(
    bits: int, zeros: list[int], sym: bool, mirrored: bool
) -> None:
    grid = Grid(bits, 2, sym=False)
    rounded = round_to_nearest(np.ones((1, 4)), grid)
    found = grid_by_zeros(replace(rounded, zeros=np.array([zeros], np.uint8)))
    assert found == replace(grid, sym=sym, mirrored=mirrored)
    stated = replace(rounded, zeros=np.array([zeros], np.uint8), grid=Grid(bits, 2, mirrored=True))
    assert grid_by_zeros(stated) == stated.grid


def test_many_groups_none_of_which_is_mirrored_are_of_no_mirrored_grid() -> None:
    """Layouts without zeros cannot say whether others let their groups be mirrored."""
    grid = Grid(4, 2, mirrored=True)
    few, many = (round_to_nearest(-np.ones((rows, 2)), grid) for rows in (15, 16))
    assert grid_by_zeros(few) == grid
    assert grid_by_zeros(many) == replace(grid, mirrored=False)
    assert grid_by_zeros(round_to_nearest(np.ones((16, 2)), grid)) == grid
