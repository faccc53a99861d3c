"""Integer activations and products against slow twins in Python integers and int64."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.numerics.activations import (
    ActivationSettings,
    activation_range,
    quantize_activations,
    rounded_inputs,
    stated,
)
from ptq_cli.numerics.integer_matmul import (
    integer_product,
    linear_dequantized,
    linear_w8a8,
)
from ptq_cli.numerics.rounding import round_to_nearest


def per_token(inputs, bits=8, percentile=1.0):
    return quantize_activations(inputs, ActivationSettings(bits, "dynamic-token", percentile))


def per_tensor(inputs, bits=8, percentile=1.0):
    return quantize_activations(inputs, ActivationSettings(bits, "dynamic-tensor", percentile))


def static(inputs, scale, bits=8):
    return quantize_activations(inputs, ActivationSettings(bits, "static", static_scale=scale))


def slow_row_codes(row, bits, percentile=1.0):
    """One row of activations, rounded as the formula says."""
    largest = {8: 127, 4: 7}[bits]
    magnitudes = sorted(abs(float(x)) for x in row)
    if not magnitudes:
        return [], 0.0
    reach = magnitudes[max(1, math.ceil(percentile * len(magnitudes))) - 1]
    scale = np.float32(np.float32(reach) / np.float32(largest))
    if scale == 0:
        return [0] * len(row), 0.0
    codes = [int(np.rint(np.float32(x) / scale)) for x in row]
    return [max(-largest, min(largest, code)) for code in codes], scale


def slow_linear(codes, scales, weight: QuantizedWeight, bias=None):
    """Σ over groups of s_x · s_g · (int64 sum of x · (c − z)), in float64."""
    group = weight.column_groups()
    centred = weight.codes.astype(np.int64) - weight.zeros.astype(np.int64)[:, group]
    outputs = np.zeros((len(codes), len(weight.codes)))
    for g in range(weight.scales.shape[1]):
        columns = np.flatnonzero(group == g)
        sums = codes[:, columns].astype(np.int64) @ centred[:, columns].T
        assert np.abs(sums).max(initial=0) < 2**31
        outputs += sums * weight.scales[:, g].astype(np.float64)
    outputs *= np.broadcast_to(scales, len(codes)).astype(np.float64)[:, None]
    return outputs if bias is None else outputs + bias.astype(np.float64)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("percentile", [1.0, 0.99, 0.5, 0.07, 1e-9])
def test_rows_equal_the_slow_twin(rng, bits, percentile):
    inputs = rng.standard_normal((9, 53)).astype(np.float32)
    inputs[3] = 0
    rounded = per_token(inputs, bits, percentile)
    for row, codes, scale in zip(inputs, rounded.codes, rounded.scales, strict=True):
        expected, step = slow_row_codes(row, bits, percentile)
        assert codes.tolist() == expected
        assert scale == step
    assert rounded.codes.dtype == np.int8
    assert rounded.scales.dtype == np.float32


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("percentile", [1.0, 0.9])
def test_a_tensor_is_one_row(rng, bits, percentile):
    inputs = rng.standard_normal((6, 11)).astype(np.float32)
    rounded = per_tensor(inputs, bits, percentile)
    expected, step = slow_row_codes(inputs.ravel(), bits, percentile)
    assert rounded.codes.ravel().tolist() == expected
    assert rounded.scales.tolist() == [step]


@given(
    n=st.integers(1, 40),
    percentile=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_the_percentile_is_an_order_statistic(n, percentile, seed):
    values = np.random.default_rng(seed).standard_normal((1, n))
    expected = np.sort(np.abs(values[0]))[math.ceil(percentile * n) - 1]
    assert activation_range(values, percentile)[0] == expected
    assert activation_range(values, percentile, per_row=True)[0] == expected


def test_the_absolute_maximum_becomes_the_largest_code():
    inputs = np.array([[-3.0, 1.6, 0.1], [0.26, 0.5, -0.5]], np.float32)
    assert per_token(inputs).codes.tolist() == [[-127, 68, 4], [66, 127, -127]]
    assert per_token(inputs, 4).codes.tolist() == [[-7, 4, 0], [4, 7, -7]]


@pytest.mark.parametrize("quantize", [per_token, per_tensor])
def test_all_zero_inputs_give_scale_zero_and_zeros(quantize):
    rounded = quantize(np.zeros((3, 5), np.float32))
    assert not rounded.codes.any()
    assert not rounded.scales.any()
    assert not rounded.dequantized().any()


@pytest.mark.parametrize("shape", [(0, 7), (4, 0), (0, 0)])
@pytest.mark.parametrize("quantize", [per_token, per_tensor])
def test_empty_inputs_give_empty_codes(quantize, shape):
    assert quantize(np.zeros(shape, np.float32)).codes.shape == shape


def test_inputs_too_small_for_a_float32_scale_are_zero():
    tiny = np.full((2, 3), 1e-45, np.float32)
    rounded = per_token(tiny)
    assert not rounded.codes.any()
    assert not rounded.scales.any()


def test_a_static_scale_clips_and_zero_is_zero():
    inputs = np.array([[-1.0, 0.26, 1000.0, 1e38]], np.float32)
    assert static(inputs, 0.5).codes.tolist() == [[-2, 1, 127, 127]]
    assert static(inputs, 0.5, 4).codes.tolist() == [[-2, 1, 7, 7]]
    assert static(inputs, 1e-30).codes.tolist() == [[-127, 127, 127, 127]]
    assert static(inputs, 0.0).codes.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_are_widened(rng, dtype):
    inputs = rng.standard_normal((4, 9)).astype(dtype)
    wide = per_token(inputs.astype(np.float64))
    rounded = per_token(inputs)
    np.testing.assert_allclose(rounded.scales, wide.scales, rtol=1e-6)
    assert np.abs(rounded.codes.astype(int) - wide.codes).max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 6},
        {"percentile": 0.0},
        {"percentile": 1.01},
        {"percentile": float("nan")},
        {"scheme": "per-token"},
        {"scheme": "static"},
        {"scheme": "static", "static_scale": -1.0},
        {"scheme": "static", "static_scale": float("inf")},
    ],
)
def test_settings_out_of_range_are_errors(wrong):
    with pytest.raises(InputError):
        ActivationSettings(**wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", ["dynamic-token", "dynamic-tensor", "static"])
def test_inputs_that_are_not_finite_are_errors(value, scheme):
    inputs = np.ones((2, 3), np.float32)
    inputs[1, 1] = value
    with pytest.raises(NumericalError, match="NaN"):
        quantize_activations(inputs, ActivationSettings(scheme=scheme, static_scale=0.1))


@pytest.mark.parametrize("per_token", [True, False])
def test_asymmetric_inputs_stand_for_what_their_codes_say(rng, per_token):
    inputs = (rng.standard_normal((5, 12)) + 2).astype(np.float32)
    inputs[0] = 0
    activation = Activation(8, sym=False, per_token=per_token)
    found = rounded_inputs(inputs, activation)
    for row in range(5):
        seen = inputs[row] if per_token else inputs
        low, high = min(0.0, seen.min()), max(0.0, seen.max())
        step = (high - low) / 255 or 1.0
        zero = round(-low / step)
        wanted = [(min(255, max(0, round(x / step) + zero)) - zero) * step for x in inputs[row]]
        np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-6)
    assert rounded_inputs(inputs[:0], activation).shape == (0, 12)


def test_static_inputs_are_clipped_at_their_codes():
    inputs = np.array([[-3.0, -1.0, 0.0, 0.26, 300.0]])
    activation = Activation(8, sym=False, dynamic=False)
    np.testing.assert_allclose(
        rounded_inputs(inputs, activation, 0.5, 4), [[-2.0, -1.0, 0.0, 0.5, 125.5]]
    )
    with pytest.raises(InputError, match="static activation scale None"):
        rounded_inputs(inputs, activation)
    with pytest.raises(InputError, match="asymmetric"):
        stated(activation, 0.5)


@pytest.mark.parametrize("k", [0, 1, 1032, 1033, 2500])
def test_products_equal_int64_at_the_extremes(rng, k):
    left = rng.choice(np.array([-127, 127, 126], np.int8), (5, k))
    right = rng.choice(np.array([-128, 127], np.int8), (7, k))
    expected = left.astype(np.int64) @ right.astype(np.int64).T
    np.testing.assert_array_equal(integer_product(left, right), expected)
    same_sign = integer_product(np.full((2, k), -127, np.int8), np.full((3, k), -128, np.int8))
    assert (same_sign == k * 127 * 128).all()
    assert same_sign.dtype == np.int32


def test_sums_that_float32_cannot_hold_are_exact(rng):
    """Odd products of one sign: 9000 of them go far beyond 2²⁴."""
    left = rng.choice(np.array([125, 127], np.int8), (3, 9001))
    right = rng.choice(np.array([-127, -123], np.int8), (4, 9001))
    expected = left.astype(np.int64) @ right.astype(np.int64).T
    assert not np.array_equal(left.astype(np.float32) @ right.T.astype(np.float32), expected)
    np.testing.assert_array_equal(integer_product(left, right), expected)


def test_products_with_minus_128_on_both_sides_stay_exact():
    codes = np.full((2, 3000), -128, np.int8)
    assert (integer_product(codes, codes) == 3000 * 128 * 128).all()


def test_an_overflow_of_int32_is_an_error():
    k = 2**31 // (127 * 128) + 1
    left, right = np.full((1, k), 127, np.int8), np.full((1, k), -128, np.int8)
    with pytest.raises(NumericalError, match="overflow"):
        integer_product(left, right)
    left[0, : k // 2] = 0
    assert integer_product(left, right)[0, 0] == -127 * 128 * (k - k // 2)


def grids():
    return [
        Grid(bits, group, sym, narrow, "float32")
        for bits in (8, 4, 3)
        for group in (0, -1, 16, 10)
        for sym, narrow in ((True, False), (True, True), (False, False))
    ]


@pytest.mark.parametrize("grid", grids(), ids=str)
@pytest.mark.parametrize("activation_bits", [8, 4])
def test_linear_equals_the_slow_twin(rng, grid, activation_bits):
    inputs = rng.standard_normal((6, 53)).astype(np.float32)
    inputs[2] = 0
    bias = rng.standard_normal(11).astype(np.float32)
    weight = round_to_nearest((rng.standard_normal((11, 53)) + 0.3).astype(np.float32), grid)
    for scheme in ("dynamic-token", "dynamic-tensor", "static"):
        how = ActivationSettings(activation_bits, scheme, static_scale=0.02)
        rounded = quantize_activations(inputs, how)
        expected = slow_linear(rounded.codes, rounded.scales, weight, bias)
        outputs = linear_w8a8(inputs, weight, bias, how)
        np.testing.assert_allclose(outputs, expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(outputs[2], bias)


@pytest.mark.parametrize("sym", [True, False])
def test_groups_longer_than_a_chunk_equal_the_slow_twin(rng, sym):
    inputs = rng.standard_normal((4, 2600)).astype(np.float32)
    weight = round_to_nearest(
        (rng.standard_normal((3, 2600)) + 0.5).astype(np.float32), Grid(8, 1100, sym)
    )
    rounded = per_token(inputs)
    expected = slow_linear(rounded.codes, rounded.scales, weight, np.zeros(3))
    np.testing.assert_allclose(linear_w8a8(inputs, weight), expected, rtol=2e-5, atol=2e-5)


def test_reordered_groups_are_gathered(rng):
    inputs = rng.standard_normal((5, 48)).astype(np.float32)
    order = rng.permutation(48)
    plain = round_to_nearest(rng.standard_normal((7, 48)).astype(np.float32), Grid(4, 16, False))
    g_idx = np.empty(48, np.int32)
    g_idx[order] = plain.grid.g_idx(48)
    codes = np.empty_like(plain.codes)
    codes[:, order] = plain.codes
    mixed = QuantizedWeight(codes, plain.scales, plain.zeros, plain.grid, g_idx)
    np.testing.assert_allclose(
        linear_w8a8(inputs, mixed), linear_w8a8(inputs[:, order], plain), rtol=1e-6, atol=1e-6
    )


def test_leading_dimensions_and_many_rows_are_kept(rng):
    weight = round_to_nearest(rng.standard_normal((4, 8)).astype(np.float32), Grid(8, -1))
    inputs = rng.standard_normal((3, 1500, 8)).astype(np.float32)
    outputs = linear_w8a8(inputs, weight)
    assert outputs.shape == (3, 1500, 4)
    np.testing.assert_array_equal(outputs[2], linear_w8a8(inputs[2], weight))
    assert linear_w8a8(inputs[:0], weight).shape == (0, 1500, 4)
    np.testing.assert_array_equal(linear_w8a8(inputs[0, 0], weight), outputs[0, 0])


def test_without_activation_rounding_it_is_the_dequantized_product(rng):
    weight = round_to_nearest(rng.standard_normal((5, 12)).astype(np.float32), Grid(4, 4))
    inputs = rng.standard_normal((3, 12)).astype(np.float32)
    expected = inputs.astype(np.float64) @ weight.dequantized().astype(np.float64).T
    for outputs in (
        linear_dequantized(inputs, weight),
        linear_w8a8(inputs, weight, None, ActivationSettings(scheme="none")),
    ):
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_the_error_of_w8a8_is_that_of_eight_bits(rng):
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    inputs = rng.standard_normal((32, 256)).astype(np.float32)
    outputs = linear_w8a8(inputs, round_to_nearest(weight, Grid(8, -1, narrow_range=True)))
    exact = inputs @ weight.T
    assert np.square(outputs - exact).sum() / np.square(exact).sum() < 3e-4


def test_widths_that_do_not_fit_are_errors(rng):
    weight = round_to_nearest(rng.standard_normal((5, 12)).astype(np.float32), Grid(8, -1))
    with pytest.raises(InputError, match="in_features 12"):
        linear_w8a8(np.zeros((2, 11), np.float32), weight)
    with pytest.raises(InputError, match="out_features 5"):
        linear_w8a8(np.zeros((2, 12), np.float32), weight, np.zeros(4, np.float32))


@pytest.fixture
def rng():
    return np.random.default_rng(20)
