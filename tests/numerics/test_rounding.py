"""Grids and rounding: `weight ≈ scales · (codes − zeros)`."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_cli.core.grid import Grid
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.numerics.integers import SEARCH_RATIOS, _group_range, fit, search_grid
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.scales import SCALE_DTYPES, SCALE_LIMITS, round_scales
from tests import oracles
from tests.numerics.cases import some_weight

FLOATS = ("bfloat16", "float16", "float32")  # in which scales of integers are stored

ASYM = Grid(4, group_size=-1, sym=False, scale_dtype="float32")
SYM = Grid(4, group_size=-1, sym=True, scale_dtype="float32")
NARROW = replace(SYM, narrow_range=True)
MIRRORED = replace(SYM, mirrored=True)


# ---- the range of a group ----


def test_asymmetric_by_hand():
    """−1 … 2 in 15 steps of 0.2; zero is five steps up."""
    result = round_to_nearest(np.array([[-1.0, 2.0, 0.29, 0.31, 0.0]]), ASYM)
    assert result.scales == np.float32(0.2)
    assert result.zeros == 5
    assert result.codes.tolist() == [[0, 15, 6, 7, 5]]


def test_symmetric_by_hand():
    """absmax 7.5 in half steps either way: scale 1, zero 8; +7.5 has no code and becomes 7."""
    result = round_to_nearest(np.array([[7.5, -6.2, 0.4, 0.6]]), SYM)
    assert result.scales == 1
    assert result.zeros == 8
    assert result.codes.tolist() == [[15, 2, 8, 9]]


def test_narrow_range_by_hand():
    """±7 around zero: the greatest weight has a code of its own on either side."""
    result = round_to_nearest(np.array([[7.0, -7.0, 3.4]]), NARROW)
    assert result.scales == 1
    assert result.codes.tolist() == [[15, 1, 11]]


def test_a_mirrored_group_has_its_greatest_weight_at_the_long_end_by_hand():
    """absmax 8 in eight steps: −8 is code 0 around 8, +8 code 15 around 7; the other end is cut
    off after seven steps."""
    result = round_to_nearest(np.array([[-8.0, 7.9, 0.4, 0.6], [8.0, -7.9, -0.4, 2.0]]), MIRRORED)
    assert result.scales.tolist() == [[1], [1]]
    assert result.zeros.tolist() == [[8], [7]]
    assert result.codes.tolist() == [[0, 15, 8, 9], [15, 0, 7, 9]]


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12), st.integers(2, 8))
def test_a_mirrored_group_is_the_mirror_image_of_the_negative_weight(row, bits):
    """Where either end is as far, both keep the longer side below zero."""
    grid, weight = replace(MIRRORED, bits=bits), np.array([row])
    for importance in (None, np.ones(len(row))):
        one, other = (round_to_nearest(w, grid, importance) for w in (weight, -weight))
        if importance is None and max(row) != -min(row):
            assert one.zeros + other.zeros == grid.max_code
            assert (one.codes + other.codes == grid.max_code).all()
        np.testing.assert_array_equal(one.scales, other.scales)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_long_side_of_the_codes_saves_error(bits):
    """Plain rounding in groups of 128: the parts of the squared error that the docstring states."""
    weight = np.random.default_rng(0).standard_normal((64, 1024))
    grid = Grid(bits, 128)

    def error(grid):
        return ((weight - round_to_nearest(weight, grid).dequantized()) ** 2).sum()

    stated = {2: 0.59, 3: 0.77, 4: 0.87, 8: 0.97}[bits]
    assert error(replace(grid, mirrored=True)) / error(grid) == pytest.approx(stated, abs=0.01)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_asymmetric_range_is_widened_to_hold_zero(sign):
    """Weights of one sign: the other end of the range is 0, so zero has a code."""
    result = round_to_nearest(sign * np.array([[1.0, 2.0, 3.0]]), ASYM)
    assert result.scales == np.float32(0.2)
    assert result.zeros == (0 if sign == 1 else 15)
    np.testing.assert_allclose(result.dequantized(), sign * np.array([[1.0, 2.0, 3.0]]), rtol=1e-6)


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_is_the_twins(bits, scale_dtype):
    weight = some_weight(200, 12)
    for grid in (ASYM, SYM, NARROW, MIRRORED):
        grid = replace(grid, bits=bits, scale_dtype=scale_dtype)
        for found, expected in zip(
            fit(weight, grid, 1), oracles.range_grid(weight, grid), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def test_the_axis_of_a_group_may_be_any():
    """The engine keeps columns in rows; the result is the same."""
    weight = some_weight(6, 12)
    for grid in (ASYM, SYM, MIRRORED):
        for along, across in zip(fit(weight, grid, 1), fit(weight.T, grid, 0), strict=True):
            np.testing.assert_array_equal(along, across)


# ---- scales as they are stored ----


@given(st.data(), st.sampled_from([np.float32, np.float64]))
def test_the_range_of_a_group_is_exact_to_the_bit(data, dtype):
    """Neighbours among the floats, zeros of both signs, subnormals; all of one sign, or not."""
    signs = data.draw(st.sampled_from([(1,), (-1,), (1, -1)]))
    size = st.sampled_from([0.0, 1e-45, 1e-38, 0.1, 1.0, float(np.nextafter(dtype(1), 2)), 3e38])
    value = st.builds(lambda sign, size: sign * size, st.sampled_from(signs), size)
    groups = data.draw(st.lists(st.lists(value, min_size=3, max_size=3), min_size=1, max_size=5))
    weight = np.array(groups, dtype)
    low, high = _group_range(weight)
    np.testing.assert_array_equal(low, np.minimum(weight.min(-1), 0), strict=True)
    np.testing.assert_array_equal(high, np.maximum(weight.max(-1), 0), strict=True)


@settings(deadline=None)
@given(st.floats(1e-9, 6e4), st.sampled_from(FLOATS))
def test_a_scale_is_the_nearest_value_of_its_dtype(scale, scale_dtype):
    grid = Grid(4, scale_dtype=scale_dtype)
    found = round_scales(np.array([scale]), grid)
    assert found == oracles.stored(np.array([scale]), grid)
    assert found.astype(SCALE_DTYPES[scale_dtype]).astype(np.float64) == found


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tiny_scale_becomes_the_smallest_there_is_and_zero_becomes_one(scale_dtype, dtype):
    smallest = SCALE_LIMITS[scale_dtype][0]
    scales = np.array([0.0, np.finfo(dtype).tiny, smallest, 2 * smallest], dtype)
    rounded = round_scales(scales, Grid(4, scale_dtype=scale_dtype))
    assert rounded.dtype == dtype
    assert rounded.tolist() == [1, smallest, smallest, 2 * smallest]


@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_the_limits_are_those_of_the_dtypes(scale_dtype):
    smallest, largest = SCALE_LIMITS[scale_dtype]
    kind = ml_dtypes.finfo(SCALE_DTYPES[scale_dtype])
    least = kind.smallest_subnormal if scale_dtype == "float16" else kind.tiny
    assert (smallest, largest) == (float(least), float(kind.max))


def test_a_scale_too_big_for_its_dtype_is_an_error_with_a_way_out():
    grid = Grid(4, scale_dtype="float16")
    assert round_scales(np.array([65504.0]), grid) == 65504
    with pytest.raises(InputError, match="of 7e\\+04 does not fit float16") as caught:
        round_scales(np.array([1.0, 7e4]), grid)
    assert caught.value.hint == "--scale-dtype float32"
    with pytest.raises(InputError, match="does not fit bfloat16"):
        round_scales(np.array([3.4e38]), replace(grid, scale_dtype="bfloat16"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grid", [ASYM, SYM, NARROW, MIRRORED])
def test_weights_that_are_no_numbers_are_an_error(grid, bad):
    weight = some_weight(3, 8)
    weight[1, 2] = bad
    with pytest.raises(InputError):
        round_to_nearest(weight, grid)


def test_the_widest_float32_range_does_not_overflow():
    largest = np.finfo(np.float32).max
    weight = np.array([[-largest, 0, largest]], np.float32)
    for grid in (ASYM, SYM, MIRRORED):
        assert np.isfinite(round_to_nearest(weight, grid).scales).all()


# ---- the search ----


def test_the_search_tries_the_whole_range_first_and_shrinks():
    assert SEARCH_RATIOS[0] == 1
    assert (np.diff(SEARCH_RATIOS) < 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_is_the_twins(bits):
    weight, importance = some_weight(50, 24), np.exp(some_weight(1, 24)[0] * 50)
    for grid in (ASYM, SYM, NARROW, MIRRORED):
        grid = replace(grid, bits=bits, scale_dtype="float16")
        found = search_grid(weight, importance, grid, 1)
        expected = oracles.search_grid(weight, importance, grid, SEARCH_RATIOS)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_the_search_never_raises_the_weighted_error(group_size):
    weight, importance = some_weight(20, 32), np.linspace(0.1, 3, 32)
    for grid in (ASYM, SYM, NARROW, MIRRORED):
        grid = replace(grid, bits=3, group_size=group_size)
        plain, searched = round_to_nearest(weight, grid), round_to_nearest(weight, grid, importance)
        before = (importance * (weight - plain.dequantized()) ** 2).sum()
        after = (importance * (weight - searched.dequantized()) ** 2).sum()
        assert after < before


def test_the_search_mirrors_the_groups_that_want_it():
    """Two levels below zero, one above: what matters decides, not the greatest weight."""
    weight = np.array([[-2.0, -1.0, -0.9, 1.1], [2.0, 1.0, 0.9, -1.1], [-2.0, 1.9, 1.0, 2.1]])
    importance = np.array([1.0, 1.0, 1.0, 1.0])
    grid = replace(MIRRORED, bits=2)
    found = round_to_nearest(weight, grid, importance)
    assert found.zeros[:2].tolist() == [[2], [1]]
    important = np.array([1e6, 1.0, 1.0, 1e-6])
    assert round_to_nearest(weight[2:], grid, important).zeros == 2
    assert round_to_nearest(weight[2:], grid).zeros == 1


def test_a_search_takes_the_zero_beside_where_that_is_better():
    """Many groups end up beside the zero of every range: the search found less error than with
    the ranges' own zeros."""
    weight, grid = some_weight(200, 24), replace(ASYM, bits=2)
    importance = np.ones(24)
    scales, zeros = search_grid(weight, importance, grid, 1)
    own = [fit(ratio * weight, grid, 1) for ratio in SEARCH_RATIOS]
    alike = np.zeros(len(weight), bool)
    for scale, zero in own:
        alike |= (scale == scales) & (zero == zeros)
    assert (~alike).sum() > 10

    def error(scale, zero):
        codes = oracles.nearest(weight, scale[:, None], zero[:, None], grid)
        return ((weight - scale[:, None] * (codes - zero[:, None])) ** 2).sum(axis=1)

    least = np.min([error(*pair) for pair in own], axis=0)
    assert (error(scales, zeros) <= least).all()
    assert (error(scales, zeros) < least)[~alike].all()


def test_unimportant_outliers_are_clipped():
    weight = np.array([[-2.5, *np.linspace(-1, 1, 15), 2.5]])
    importance = np.array([0.0, *np.ones(15), 0.0])
    plain, searched = round_to_nearest(weight, ASYM), round_to_nearest(weight, ASYM, importance)
    assert searched.scales < plain.scales / 2


# ---- round to nearest ----


@pytest.mark.parametrize("group_size", [-1, 0, 1, 3, 8, 30, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("searched", [False, True])
def test_rounding_is_the_twins(searched, bits, group_size):
    """Groups of every kind, a short last one among them."""
    weight = some_weight(7, 30)
    importance = np.linspace(0.5, 2, 30) if searched else None
    for grid in (ASYM, SYM, NARROW, MIRRORED):
        grid = replace(grid, bits=bits, group_size=group_size, scale_dtype="float16")
        result = round_to_nearest(weight, grid, importance)
        ratios = SEARCH_RATIOS if searched else (1.0,)
        twin = oracles.round_to_nearest(weight, grid, importance, ratios)
        assert result.scales.shape == grid.scales_shape(weight.shape)
        np.testing.assert_array_equal(result.scales.astype(np.float64), twin.scales)
        np.testing.assert_array_equal(result.zeros, twin.zeros)
        np.testing.assert_array_equal(result.column_groups(), twin.groups)
        np.testing.assert_allclose(result.dequantized(), twin.weight, rtol=1e-6)
        if not grid.sym:
            np.testing.assert_array_equal(result.codes, twin.codes)


weights = st.lists(st.floats(-100, 100), min_size=1, max_size=12).map(lambda row: np.array([row]))


@settings(deadline=None)
@given(weights, st.integers(2, 8), st.sampled_from([ASYM, SYM, NARROW]))
def test_no_weight_moves_further_than_half_a_step(weight, bits, grid):
    """Not at the ends either, where a symmetric grid has no code for +absmax; float32 scales are
    off by a part in 2^24, at most 255 times."""
    result = round_to_nearest(weight, replace(grid, bits=bits))
    scale = float(result.scales[0, 0])
    error = np.abs(weight - result.scales[0, 0].astype("f8") * (result.codes - 0.0 - result.zeros))
    assert error.max() <= scale / 2 * (1 + 2**-12)


@settings(deadline=None)
@given(weights, st.integers(2, 8))
def test_the_long_side_of_a_mirrored_group_has_a_code_for_its_end(weight, bits):
    """No weight moves further than half a step there; at the other end than one step."""
    result = round_to_nearest(weight, replace(MIRRORED, bits=bits))
    scale, zero = float(result.scales[0, 0]), int(result.zeros[0, 0])
    error = np.abs(weight - scale * (result.codes.astype(float) - zero)) / scale
    short = result.codes == (0 if zero < 2 ** (bits - 1) else 2**bits - 1)
    assert error[~short].max(initial=0) <= 0.5 * (1 + 2**-12)
    assert error[short].max(initial=0) <= 1 + 2**-12


@settings(deadline=None)
@given(weights, st.integers(2, 8))
def test_narrow_codes_stay_within_their_range(weight, bits):
    codes = round_to_nearest(weight, replace(NARROW, bits=bits)).codes.astype(int)
    assert np.abs(codes - 2 ** (bits - 1)).max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("grid", [ASYM, SYM, NARROW, MIRRORED])
@pytest.mark.parametrize("group_size", [-1, 0, 4])
def test_zeros_have_scale_one_and_no_error(grid, group_size):
    result = round_to_nearest(np.zeros((3, 10)), replace(grid, group_size=group_size))
    assert (result.scales == 1).all()
    assert (result.dequantized() == 0).all()


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("value", [0.37, -0.37, 1e4])
@pytest.mark.parametrize("bits", range(2, 9))
def test_constant_weights_are_hit_within_half_a_step(bits, value, scale_dtype):
    """Zero and the constant are the ends of the range; only the stored scale is off, and at 8
    bits and bfloat16 that costs 255 · 2^−9 of a step."""
    grid = replace(ASYM, bits=bits, scale_dtype=scale_dtype)
    result = round_to_nearest(np.full((2, 9), value), grid)
    scale = float(result.scales[0, 0])
    assert np.abs(value - result.dequantized()).max() <= scale / 2


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("size", [1e-300, 1e-40, 1e-20, 1e-9])
def test_tiny_weights_stay_finite(size, scale_dtype):
    for grid in (ASYM, SYM, NARROW, MIRRORED):
        grid = replace(grid, group_size=4, scale_dtype=scale_dtype)
        weight = some_weight(4, 12) * size
        for dtype in (np.float32, np.float64):
            result = round_to_nearest(weight.astype(dtype), grid, np.ones(12, dtype))
            assert (result.scales.astype(np.float64) > 0).all()
            assert np.isfinite(result.dequantized()).all()


@pytest.mark.parametrize("group_size", [-1, 0, 1, 4])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 0)])
def test_nothing_to_round(shape, group_size):
    for grid in (ASYM, SYM, MIRRORED):
        grid = replace(grid, group_size=group_size)
        result = round_to_nearest(np.zeros(shape), grid, np.ones(shape[1]))
        assert result.codes.shape == result.dequantized().shape == shape
        assert result.scales.shape == result.zeros.shape == grid.scales_shape(shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_have_the_dtypes_they_promise(dtype):
    for scale_dtype in FLOATS:
        stored = SCALE_DTYPES[scale_dtype]
        weight = some_weight(3, 8).astype(dtype)
        result = round_to_nearest(weight, Grid(4, 4, scale_dtype=scale_dtype))
        assert result.codes.dtype == result.zeros.dtype == np.uint8
        assert result.scales.dtype == stored
        assert result.dequantized().dtype == np.float32


# ---- the values themselves ----


def test_groups_of_a_row():
    grid = Grid(4, group_size=4)
    assert grid.starts(10) == [0, 4, 8, 10]
    assert grid.n_groups(10) == 3
    assert grid.g_idx(10).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    for whole_row in (-1, 0, 10, 11):
        assert Grid(4, whole_row).starts(10) == [0, 10]
        assert Grid(4, whole_row).n_groups(10) == 1


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3), slice(0, 0), slice(4, None)])
@pytest.mark.parametrize("group_size", [-1, 0, 4])
def test_dequantized_rows_are_rows_of_the_dequantized(rows, group_size):
    result = round_to_nearest(some_weight(5, 10), Grid(3, group_size, sym=False))
    np.testing.assert_array_equal(result.dequantized(rows), result.dequantized()[rows])


def test_dequantized_reads_the_group_of_each_column():
    result = QuantizedWeight(
        codes=np.array([[3, 1, 2]], np.uint8),
        scales=np.array([[0.5, 2.0]], np.float16),
        zeros=np.array([[1, 2]], np.uint8),
        grid=Grid(2, group_size=2, sym=False),
        g_idx=np.array([1, 0, 0], np.int32),
    )
    assert result.dequantized().tolist() == [[2.0, 0.0, 0.5]]
