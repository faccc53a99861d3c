"""Small floats as levels: rounded, coded and fitted, against the twin; and GPTQ on them."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_cli.core.grid import Grid
from ptq_cli.core.levels import SMALL_FLOATS
from ptq_cli.numerics.feedback import make_feedback
from ptq_cli.numerics.gptq import solve
from ptq_cli.numerics.panel import Passes
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.scales import round_scales, stored_scales
from ptq_cli.numerics.small_floats import (
    SEARCH_EXPONENTS,
    SEARCH_RATIOS,
    read_codes,
    round_levels,
    write_codes,
)
from tests import oracles
from tests.numerics.cases import DAMP, some_hessian, some_weight

FP8 = Grid(8, group_size=-1, scale_dtype="float32", levels="e4m3")
FP8_BLOCK = replace(FP8, group_size=16, block_rows=4)
NVFP4 = Grid(4, group_size=16, scale_dtype="e4m3", levels="e2m1", global_scale=12345.0)
MXFP4 = Grid(4, group_size=32, scale_dtype="e8m0", levels="e2m1")
MXFP8 = Grid(8, group_size=32, scale_dtype="e8m0", levels="e4m3")
GRIDS = {"fp8": FP8, "nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp8": MXFP8}
OTHERS_KINDS = {"e2m1": ml_dtypes.float4_e2m1fn, "e4m3": ml_dtypes.float8_e4m3fn}

names = pytest.mark.parametrize("name", list(SMALL_FLOATS))
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))


def ratios_of(grid):
    if grid.scale_dtype == "e8m0":
        return tuple(2.0**exponent for exponent in SEARCH_EXPONENTS)
    return SEARCH_RATIOS[grid.levels]


def grid_of(name):
    return FP8 if name == "e4m3" else NVFP4


# ---- levels and codes ----


@names
def test_the_table_of_levels_is_ml_dtypes(name):
    codes = np.arange(2 ** SMALL_FLOATS[name].bits, dtype=np.uint8)
    levels = codes.view(OTHERS_KINDS[name]).astype(np.float32)
    np.testing.assert_array_equal(SMALL_FLOATS[name].values, levels)


@names
def test_every_code_is_its_level_and_back(name):
    grid = grid_of(name)
    codes = np.arange(2**grid.bits, dtype=np.uint8)
    codes = codes[np.isfinite(SMALL_FLOATS[name].values)]
    for dtype in (np.float32, np.float64):
        levels, back = read_codes(codes, grid, np.dtype(dtype)), np.empty_like(codes)
        assert levels.dtype == dtype
        np.testing.assert_array_equal(round_levels(levels, grid), levels)
        write_codes(levels, grid, back)
        np.testing.assert_array_equal(back, codes)


@names
@given(st.floats(-1000, 1000, allow_nan=False, width=32))
def test_a_step_goes_to_the_nearest_level(name, step):
    found = round_levels(np.array([step]), grid_of(name))
    np.testing.assert_array_equal(found, oracles.nearest_level(np.array([step]), name))


@names
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_go_to_the_even_code(name, dtype):
    levels = np.array(oracles.LEVELS[name], dtype)
    middles = (levels[1:] + levels[:-1]) / 2
    even = np.where(np.arange(len(middles)) % 2 == 0, levels[:-1], levels[1:])
    np.testing.assert_array_equal(round_levels(middles, grid_of(name)), even)
    np.testing.assert_array_equal(round_levels(-middles, grid_of(name)), -even)


# ---- scales ----


@given(st.floats(1e-30, 1e30))
def test_a_power_of_two_is_the_nearest(scale):
    found = float(round_scales(np.array([scale]), MXFP4)[0])
    exponent = np.log2(found)
    assert exponent == round(exponent)
    assert abs(scale - found) <= min(abs(scale - found / 2), abs(scale - found * 2))


def test_an_e4m3_scale_is_divided_by_the_global_one():
    scales = np.array([0.0, 1e-9, 0.001, 448 / 12345, 1.0], np.float32)
    stored = stored_scales(scales, NVFP4)
    assert stored.dtype == ml_dtypes.float8_e4m3fn
    assert stored.astype(float).tolist() == [2**-9, 2**-9, 12.0, 448.0, 448.0]
    expected = stored.astype(np.float32) / np.float32(12345)
    np.testing.assert_array_equal(round_scales(scales, NVFP4), expected)


# ---- plain rounding ----


@grids
@pytest.mark.parametrize("search", [False, True])
def test_rounding_is_the_twins(grid, search):
    weight = some_weight(20, 96)
    energy = np.random.default_rng(1).uniform(0.1, 2, 96) if search else None
    ratios = ratios_of(grid) if search else (1.0,)
    found = round_to_nearest(weight, grid, energy)
    twin = oracles.round_to_nearest(weight, grid, energy, ratios)
    np.testing.assert_array_equal(found.float_scales().astype(np.float64), twin.scales)
    np.testing.assert_allclose(found.dequantized(), twin.weight, rtol=1e-6)
    assert not found.zeros.any()


@grids
def test_a_search_is_never_worse(grid):
    weight = some_weight(30, 64, seed=3)
    error = [
        np.square(weight - round_to_nearest(weight, grid, importance).dequantized()).sum()
        for importance in (None, np.ones(64))
    ]
    assert error[1] < error[0]


@pytest.mark.parametrize("search", [False, True])
def test_blocks_of_rows_share_a_scale(search):
    """10 × 40 in blocks of 4 × 16: the last row and the last column of blocks are short."""
    weight = some_weight(10, 40)
    importance = np.random.default_rng(2).uniform(0.1, 2, 40) if search else None
    found = round_to_nearest(weight, FP8_BLOCK, importance)
    assert found.scales.shape == (3, 3)
    for i, rows in enumerate([slice(0, 4), slice(4, 8), slice(8, 10)]):
        for j, columns in enumerate([slice(0, 16), slice(16, 32), slice(32, 40)]):
            block = weight[rows, columns].reshape(1, -1)
            own = np.ones(40) if importance is None else importance
            own = np.tile(own[columns], rows.stop - rows.start)
            ratios = SEARCH_RATIOS["e4m3"] if search else (1.0,)
            scale, _ = oracles.search_grid(block, own, FP8, ratios)
            assert found.scales[i, j] == scale[0]
            levels = oracles.nearest_level(block / scale[0], "e4m3").reshape(-1)
            np.testing.assert_allclose(
                found.dequantized()[rows, columns].ravel(), scale[0] * levels, rtol=1e-6
            )
    np.testing.assert_array_equal(found.dequantized(slice(3, 9)), found.dequantized()[3:9])
    np.testing.assert_array_equal(found.panel(slice(4, 10)).dequantized(), found.dequantized()[4:])


def test_a_tensor_of_zeros_stays_zero():
    for grid in (*GRIDS.values(), FP8_BLOCK, replace(FP8, group_size=0)):
        for importance in (None, np.ones(64)):
            assert not round_to_nearest(np.zeros((5, 64)), grid, importance).dequantized().any()


# ---- GPTQ ----


@grids
@pytest.mark.parametrize("act_order", ["none", "static"])
@pytest.mark.parametrize("passes", [Passes(False, 0, 0), Passes(True, 2, 2)], ids=["plain", "full"])
def test_gptq_is_the_papers_loop(grid, act_order, passes):
    weight, hessian = some_weight(6, 64), some_hessian(64)
    feedback = make_feedback(hessian, DAMP, grid, act_order, passes.refine > 0)
    found = solve(weight, grid, feedback, passes)
    twin = oracles.gptq(
        weight, hessian, grid, damp=DAMP, act_order=act_order,
        ratios=ratios_of(grid) if passes.mse else (1.0,),
        refine=passes.refine, sweeps=passes.sweeps,
    )  # fmt: skip
    np.testing.assert_array_equal(found.float_scales().astype(np.float64), twin.scales)
    np.testing.assert_allclose(found.dequantized(), twin.weight, rtol=1e-6)


@pytest.mark.parametrize("grid", [FP8_BLOCK, replace(FP8, group_size=0)], ids=["block", "tensor"])
def test_gptq_keeps_scales_that_rows_share(grid):
    weight, hessian = some_weight(10, 40), some_hessian(40)
    feedback = make_feedback(hessian, DAMP, grid, "static")
    found = solve(weight, grid, feedback, Passes())
    plain = round_to_nearest(weight, grid, np.ones(40))
    np.testing.assert_array_equal(found.scales, plain.scales)
    loss = [oracles.loss(weight, own.dequantized(), hessian) for own in (found, plain)]
    assert loss[0] < loss[1]
