"""SmoothQuant factors, the search for alpha, channel importance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.plugins import SmoothingCase
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.methods.smoothquant import SMOOTHER, SmoothquantSettings
from ptq_cli.numerics.activations import ActivationSettings
from ptq_cli.numerics.integer_matmul import linear_w8a8
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.smoothquant import (
    ALPHAS,
    EPSILON,
    alpha_errors,
    channel_importance,
    check_factors,
    function_change,
    smooth_factors,
    tied,
    weights_absmax,
)
from ptq_cli.numerics.statistics import SiteAccumulator

W8 = Grid(8, -1, narrow_range=True, scale_dtype="float32")
TENSOR = ActivationSettings(scheme="dynamic-tensor")
TOKEN = ActivationSettings(scheme="dynamic-token")
PER_TOKEN, PER_TENSOR = Activation(), Activation(per_token=False)
ROUNDED = {"dynamic-token": PER_TOKEN, "dynamic-tensor": PER_TENSOR}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def site(rng, n=64, width=96, loud=()):
    """Inputs and the weights of two linears; the inputs of `loud` channels are 64 times greater
    and their columns 64 times smaller, so the outputs are what they would be without."""
    inputs = rng.standard_normal((n, width)).astype(np.float32)
    weights = [rng.standard_normal((rows, width)).astype(np.float32) for rows in (48, 32)]
    inputs[:, list(loud)] *= 64
    for weight in weights:
        weight[:, list(loud)] /= 64
    return inputs, weights


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_equal_the_formula_channel_by_channel(rng, alpha):
    inputs, weights = site(rng)
    factors = smooth_factors(np.abs(inputs).max(0), weights_absmax(weights), alpha)
    for j in range(inputs.shape[1]):
        loudest = max(abs(float(x)) for x in inputs[:, j])
        heaviest = max(abs(float(w)) for weight in weights for w in weight[:, j])
        assert factors[j] == pytest.approx(loudest**alpha / heaviest ** (1 - alpha), rel=1e-6)
    assert factors.dtype == np.float32


def test_silent_channels_are_floored():
    loud, heavy = np.array([4.0, 0.0, 1.0]), np.array([1.0, 2.0, 0.0])
    factors = smooth_factors(loud, heavy, 0.5)
    expected = [2.0, np.sqrt(4 * EPSILON / 2), np.sqrt(1 / (2 * EPSILON))]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)
    assert (smooth_factors(np.zeros(3), heavy, 0.5) == 1).all()
    assert (smooth_factors(loud, np.zeros(3), 0.5) == 1).all()
    assert smooth_factors(np.zeros(0), np.zeros(0), 0.5).shape == (0,)


def test_statistics_that_do_not_fit_are_errors():
    with pytest.raises(NumericalError, match="NaN"):
        smooth_factors(np.array([1.0, np.nan]), np.ones(2), 0.5)
    with pytest.raises(InputError, match="in_features 4"):
        check_factors(np.ones(3), 4)
    for wrong in (0.0, -1.0, np.inf, np.nan, 1e-44):
        with pytest.raises(NumericalError, match="factor"):
            check_factors(np.array([1.0, wrong], np.float32), 2)


@given(seed=st.integers(0, 2**16), alpha=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_smoothing_does_not_change_the_function(seed, alpha):
    inputs, weights = site(np.random.default_rng(seed), 8, 24, loud=(3, 7))
    factors = smooth_factors(np.abs(inputs).max(0), weights_absmax(weights), alpha)
    smoothed = [weight * factors for weight in weights]
    assert function_change(inputs, weights, inputs / factors, smoothed) < 1e-6


def test_function_change_is_a_relative_norm(rng):
    inputs, weights = site(rng)
    grown = [weight * np.float32(1.25) for weight in weights]
    assert function_change(inputs, weights, inputs, grown) == pytest.approx(0.25)
    assert function_change(inputs * 0, weights, inputs * 0, weights) == 0
    assert function_change(inputs * 0, weights, inputs, weights) == np.inf


def test_ties_share_the_greatest_and_the_mean():
    values, ties = np.array([1.0, 5.0, 3.0, 2.0], np.float32), np.array([4, 9, 4, 9])
    assert tied(values, ties).tolist() == [3, 5, 3, 5]
    assert tied(values, ties, "mean").tolist() == [2, 3.5, 2, 3.5]
    assert tied(values, None) is values
    assert tied(values, ties).dtype == np.float32


def quantized_error(inputs, weights, how, factors=1):
    """`Σ‖Y − Ŷ‖² / Σ‖Y‖²` over the linears of a site, with the integer product for Ŷ."""
    change = total = 0.0
    for weight in weights:
        exact = inputs.astype(np.float64) @ weight.astype(np.float64).T
        rounded = round_to_nearest(weight * factors, W8)
        change += np.square(linear_w8a8(inputs / factors, rounded, None, how) - exact).sum()
        total += np.square(exact).sum()
    return change / total


def searched(inputs, weights, scheme, ties=None):
    """What `--alpha auto` chooses; None: no smoothing."""
    sums = SiteAccumulator(inputs.shape[1], heldout_every=0)
    sums.update(inputs)
    statistics = sums.result("site", ("a", "b"))
    case = SmoothingCase(tuple(weights), statistics, ties, W8, ROUNDED[scheme])
    found = SMOOTHER.search(case, SmoothquantSettings("auto", scheme))
    return found[0] if found else None


def test_loud_channels_are_smoothed_a_hundredfold(rng):
    """The rescaling of the issue: 1 % of the channels 64 times louder, their columns 64 times
    smaller; per-tensor activations."""
    loud = tuple(rng.choice(400, 4, replace=False))
    state = rng.bit_generator.state
    inputs, weights = site(rng, 128, 400, loud)
    rng.bit_generator.state = state
    calm_inputs, calm_weights = site(rng, 128, 400)
    choice = searched(inputs[:96], weights, "dynamic-tensor")
    before = quantized_error(inputs[96:], weights, TENSOR)
    after = quantized_error(inputs[96:], weights, TENSOR, choice.factors)
    calm = quantized_error(calm_inputs[96:], calm_weights, TENSOR)
    assert before > 100 * after
    assert after < 1.5 * calm


@pytest.mark.parametrize("how", [TENSOR, TOKEN])
def test_the_search_takes_the_best_of_all_alphas(rng, how):
    inputs, weights = site(rng, 32, 48, loud=(1, 30))
    errors = alpha_errors(inputs, weights, W8, ROUNDED[how.scheme])
    assert list(errors) == [None, *ALPHAS]
    assert ALPHAS[0] == 0
    assert ALPHAS[-1] == 1
    assert len(ALPHAS) == 21
    heavy = weights_absmax(weights)
    for alpha in ALPHAS[::5]:  # made from one half, tried on the other
        factors = smooth_factors(np.abs(inputs[:16]).max(0), heavy, alpha)
        expected = quantized_error(inputs[16:], weights, how, factors)
        assert errors[alpha] == pytest.approx(expected, rel=1e-3)
    plain = quantized_error(inputs[16:], weights, how)
    assert errors[None] == pytest.approx(plain, rel=1e-3)
    choice = searched(inputs, weights, how.scheme)
    assert errors[choice.strength] == min(errors.values()) < errors[None]
    final = smooth_factors(np.abs(inputs).max(0), heavy, choice.strength)
    np.testing.assert_array_equal(choice.factors, final)
    assert min(alpha_errors(inputs[:1], weights, W8, ROUNDED[how.scheme]).values()) > 0


def test_no_smoothing_wins_where_it_is_best(rng):
    """Weights already on their grid, inputs that are small integers: nothing beats leaving them."""
    weights = [rng.integers(-127, 128, (40, 16)).astype(np.float32)]
    weights[0][:, 0], weights[0][0] = 127, 127
    inputs = rng.integers(-127, 128, (50, 16)).astype(np.float32)
    inputs[:, 0] = 127
    inputs[:, 1:] *= rng.integers(0, 2, (50, 15))
    errors = alpha_errors(inputs, weights, W8, PER_TOKEN)
    assert errors[None] == min(errors.values()) < 1e-12
    assert searched(inputs, weights, "dynamic-token") is None


def test_the_range_of_the_whole_sample_stands_for_a_static_one(rng):
    inputs, weights = site(rng, 32, 48, loud=(1, 30))
    statistics = SiteAccumulator(48, heldout_every=0)
    loudness = rng.permutation(np.geomspace(0.01, 9, 32, dtype=np.float32))  # of each token
    statistics.update(inputs * loudness[:, None])
    found = statistics.result("site", ("a", "b"))
    cases = {
        scheme: SmoothingCase(tuple(weights), found, None, W8, activation)
        for scheme, activation in {"static": Activation(dynamic=False), **ROUNDED}.items()
    }
    chosen = {
        scheme: SMOOTHER.search(case, SmoothquantSettings("auto", scheme))[0].strength
        for scheme, case in cases.items()
    }
    assert chosen["static"] == chosen["dynamic-tensor"] != chosen["dynamic-token"]


def test_tied_channels_get_equal_factors(rng):
    inputs, weights = site(rng, 32, 48, loud=(1,))
    ties = np.tile(np.arange(24), 2)
    choice = searched(inputs, weights, "dynamic-tensor", ties)
    np.testing.assert_array_equal(choice.factors[:24], choice.factors[24:])


def test_a_scale_that_does_not_fit_only_loses(rng):
    inputs, weights = site(rng, 16, 24)
    grid = Grid(8, -1, narrow_range=True)
    errors = alpha_errors(inputs, [w * np.float32(2e6) for w in weights], grid, PER_TENSOR)
    assert np.isfinite(errors[None])
    assert not np.isfinite(list(errors.values())).all()
    with pytest.raises(NumericalError, match="no smoothing"):
        alpha_errors(
            inputs, [w * np.float32(1e9) for w in weights], grid, PER_TENSOR, alphas=(1.0,)
        )


def test_importance_is_the_loudest_input_times_the_mean_weight(rng):
    inputs, weights = site(rng, 10, 6)
    rows = np.concatenate(weights)
    expected = np.abs(inputs).max(0) * np.abs(rows).mean(0)
    importance = channel_importance(np.abs(inputs).max(0), weights)
    np.testing.assert_allclose(importance, expected, rtol=1e-6)
