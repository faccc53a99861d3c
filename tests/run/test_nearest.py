"""Plain rounding a panel at a time: the same as all at once, and packed so that it comes back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.errors import InputError
from ptq_cli.numerics.output_errors import PANEL_ELEMENTS, measure
from ptq_cli.numerics.parallel import use_threads
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.registry import format_named
from ptq_cli.run.nearest import round_layer, same_weight

SHAPE = (1100, 520)  # two panels, the first of several pieces; a short last group
GRIDS = [Grid(4), Grid(4, sym=False), Grid(3, group_size=-1), Grid(8, group_size=40)]


def layer_of(grid, shape=SHAPE):
    return Layer("layer", "layer.weight", shape, shape, "F32", grid)


@pytest.fixture(scope="module")
def weight():
    assert SHAPE[0] * SHAPE[1] > PANEL_ELEMENTS
    return np.random.default_rng(0).standard_normal(SHAPE, np.float32)


@pytest.mark.parametrize("fmt", ["ptq", "compressed-tensors"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_panels_are_the_whole(weight, grid, fmt):
    if fmt != "ptq" and SHAPE[1] % grid.width(SHAPE[1]):
        grid = replace(grid, group_size=40)
    tensors, measures = round_layer(weight, layer_of(grid), format_named(fmt), None)
    whole = round_to_nearest(weight, grid)
    assert same_weight(format_named(fmt).decode(layer_of(grid), tensors), whole)
    expected = measure(weight, whole)
    assert measures.max_abs_err == expected.max_abs_err
    np.testing.assert_allclose(measures.rel_err, expected.rel_err, rtol=1e-6)
    specs = {spec.name: spec.shape for spec in format_named(fmt).specs(layer_of(grid))}
    assert {name: values.shape for name, values in tensors.items()} == specs


def test_threads_change_nothing(weight):
    fmt, layer = format_named("ptq"), layer_of(Grid(4))
    alone, errors = round_layer(weight, layer, fmt, None)
    with use_threads(3):
        together, same = round_layer(weight, layer, fmt, None)
    assert same == errors
    for name, values in alone.items():
        np.testing.assert_array_equal(together[name], values)


@pytest.mark.parametrize("row", [0, SHAPE[0] - 1])
@pytest.mark.parametrize("by_rows", [True, False])
def test_what_does_not_unpack_to_the_same_is_refused(weight, by_rows, row):
    """One bit of one row, in the first panel or in the last."""
    native = format_named("ptq")
    seen = 0

    def encode(layer, rounded):
        nonlocal seen
        tensors = native.encode(layer, rounded)
        packed = tensors["layer.qweight"]
        if seen <= row < seen + len(packed):
            packed[row - seen, 3] ^= 1
        seen += len(packed)
        return tensors

    broken = replace(native, encode=encode, by_rows=lambda layer: by_rows)
    with pytest.raises(InputError, match="does not unpack to the same"):
        round_layer(weight, layer_of(Grid(4)), broken, None)


@pytest.mark.parametrize("fmt", ["ptq", "compressed-tensors"])
def test_outputs_are_measured_multiplied(weight, fmt):
    """Each row by its own factor, in every piece of every panel."""
    grid = Grid(4, group_size=40)
    outputs = np.random.default_rng(1).uniform(0.1, 10, SHAPE[0])
    tensors, measures = round_layer(weight, layer_of(grid), format_named(fmt), None, outputs)
    whole = format_named(fmt).decode(layer_of(grid), tensors)
    assert measure(weight, whole, outputs=outputs) == measures
    scaled = weight * outputs[:, None]
    error = scaled - whole.dequantized() * outputs[:, None]
    np.testing.assert_allclose(measures.rel_err, (error**2).sum() / (scaled**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(measures.max_abs_err, np.abs(error).max(), rtol=1e-5)
