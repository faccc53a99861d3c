"""Measures: equal to their formulas on the Hessian, on held-out inputs, and without either."""

from __future__ import annotations

from math import log10

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.numerics import output_errors
from ptq_cli.numerics.output_errors import Inputs
from ptq_cli.numerics.rounding import round_to_nearest
from tests import oracles


@pytest.fixture
def case():
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((50, 24)).astype(np.float32)
    x = rng.standard_normal((200, 24)).astype(np.float32)
    return weight, round_to_nearest(weight, Grid(3, 8)), x.T @ x / 200, x[:40].astype(np.float16)


@pytest.mark.parametrize("rows", [1024, 7])
def test_measures_equal_their_formulas(case, rows, monkeypatch):
    monkeypatch.setattr(output_errors, "ROWS_AT_ONCE", rows)
    weight, rounded, hessian, heldout = case
    result = output_errors.measure(weight, rounded, Inputs(hessian, None, heldout))
    error = weight - rounded.dequantized()
    loss = oracles.loss(weight, rounded.dequantized(), hessian)
    energy = oracles.loss(weight, 0 * weight, hessian)
    assert result.loss == pytest.approx(loss, rel=1e-4)
    assert result.rel_err == pytest.approx(loss / energy, rel=1e-4)
    change, output = error @ heldout.T.astype(np.float64), weight @ heldout.T.astype(np.float64)
    assert result.heldout_rel_err == pytest.approx((change**2).sum() / (output**2).sum(), rel=1e-4)
    assert result.sqnr_db == pytest.approx(-10 * log10((error**2).sum() / (weight**2).sum()))
    assert result.max_abs_err == abs(error).max()


def test_without_calibration_the_hessian_is_the_identity(case):
    weight, rounded, _, _ = case
    result = output_errors.measure(weight, rounded)
    identity = output_errors.measure(weight, rounded, Inputs(np.eye(24, dtype=np.float32)))
    assert result.loss == pytest.approx(identity.loss, rel=1e-5)
    assert result.rel_err == pytest.approx(identity.rel_err, rel=1e-5)
    assert result.heldout_rel_err is None


def test_nothing_lost_of_nothing_is_zero():
    weight = np.zeros((3, 8), np.float32)
    result = output_errors.measure(weight, round_to_nearest(weight, Grid(4)))
    assert (result.loss, result.rel_err, result.sqnr_db) == (0.0, 0.0, None)


def test_a_sample_stands_for_the_hessian_of_its_inputs(case):
    weight, rounded, _, heldout = case
    x = np.random.default_rng(4).standard_normal((60, 24)).astype(np.float32)
    exact = output_errors.measure(weight, rounded, Inputs(x.T @ x / 60, None, heldout))
    found = output_errors.measure(weight, rounded, Inputs(None, x, heldout))
    assert found.loss == pytest.approx(exact.loss, rel=1e-5)
    assert found.rel_err == pytest.approx(exact.rel_err, rel=1e-5)
    assert found.heldout_rel_err == exact.heldout_rel_err


def test_the_energy_of_one_rounding_serves_another(case):
    weight, rounded, _, heldout = case
    inputs = Inputs(None, heldout[:20], heldout[20:])
    energy = output_errors.measure(weight, round_to_nearest(weight, Grid(2, 8)), inputs).energy
    assert output_errors.measure(weight, rounded, inputs, energy=energy) == output_errors.measure(
        weight, rounded, inputs
    )
