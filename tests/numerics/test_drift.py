"""The correction for drift, against the least squares and the search it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.core.statistics import Drift
from ptq_cli.errors import NumericalError
from ptq_cli.numerics import drift
from ptq_cli.numerics.drift import (
    STREAM_DAMP,
    DriftSum,
    corrected_stream,
    correction,
    proven_strength,
    solved_drift,
)
from ptq_cli.numerics.feedback import make_feedback
from ptq_cli.numerics.output_errors import Inputs, error_with_rounded_inputs, measure
from ptq_cli.numerics.rounding import round_to_nearest

RANDOM = np.random.default_rng(3)
EXACT = RANDOM.standard_normal((200, 12))
INPUTS = EXACT + 0.3 * RANDOM.standard_normal((200, 12)) @ RANDOM.standard_normal((12, 12))
WEIGHT = RANDOM.standard_normal((7, 12))
STREAM = 0.5 * INPUTS @ RANDOM.standard_normal((12, 7)) + RANDOM.standard_normal((200, 7))
NONE = np.zeros(200, np.bool_)


def drift_of(rows: slice, *, stream: bool = True) -> Drift:
    moved, inputs, n = EXACT[rows] - INPUTS[rows], INPUTS[rows], len(EXACT[rows])
    if not stream:
        return Drift(moved.T @ inputs / n, EXACT)
    return Drift(None, EXACT, (STREAM[rows] + moved @ WEIGHT.T).T @ inputs / n, STREAM)


def change_of(damp: float, act_order: str = "none", **options: bool) -> np.ndarray:
    feedback = make_feedback(INPUTS.T @ INPUTS / len(INPUTS), damp, Grid(4, 4), act_order)
    drift = drift_of(slice(None), **options)
    return correction(WEIGHT, drift, solved_drift(drift, feedback))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("act_order", ["none", "static", "desc"])
@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_the_target_is_the_least_squares_one_held_to_the_weight(
    damp: float, act_order: str, stream: bool
) -> None:
    hessian = INPUTS.T @ INPUTS / len(INPUTS)
    root = np.sqrt(damp * hessian.diagonal().mean() * len(INPUTS))
    rows = np.vstack([INPUTS, root * np.eye(12)])
    outputs = EXACT @ WEIGHT.T + (STREAM if stream else 0)
    wanted = np.vstack([outputs, root * WEIGHT.T])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = WEIGHT + change_of(damp, act_order, stream=stream)
    np.testing.assert_allclose(found, solution, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stream", [False, True])
def test_the_strength_is_the_best_on_held_out_tokens(stream: bool) -> None:
    """Fitted to a few tokens, the change is too large for others."""
    few = INPUTS[:16]
    feedback = make_feedback(few.T @ few / 16, 0.01, Grid(4, 4), "none")
    drift = drift_of(slice(16), stream=stream)
    change = correction(WEIGHT, drift, solved_drift(drift, feedback))
    found = proven_strength(WEIGHT, change, drift, INPUTS)
    wanted = EXACT @ WEIGHT.T + (STREAM if stream else 0)

    def lost(strength: float) -> float:
        return float(((wanted - INPUTS @ (WEIGHT + strength * change).T) ** 2).sum())

    tried = np.linspace(0, 1, 1001)
    assert found == pytest.approx(tried[np.argmin([lost(s) for s in tried])], abs=1e-3)
    assert 0.01 < found < 0.99


def test_a_change_that_does_harm_or_is_not_enough_is_taken_at_0_or_1() -> None:
    drift, change = drift_of(slice(None)), change_of(0.01)
    assert proven_strength(WEIGHT, -change, drift, INPUTS) == 0
    assert proven_strength(WEIGHT, 0.1 * change, drift, INPUTS) == 1
    assert proven_strength(WEIGHT, 0 * change, drift, INPUTS) == 0


def test_without_held_out_tokens_the_strength_is_a_constant() -> None:
    assert proven_strength(WEIGHT, change_of(0.01), drift_of(slice(None)), INPUTS[:0]) == 0.75


def test_a_strength_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        proven_strength(WEIGHT, 1e30 * change_of(0.01), drift_of(slice(None)), INPUTS)


@pytest.mark.parametrize("piece", [7, 64, 200])
def test_sums_leave_out_the_held_out_tokens(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "COLUMNS", 5)
    exact, inputs, stream, weight = (x.astype(np.float32) for x in (EXACT, INPUTS, STREAM, WEIGHT))
    alone, added = DriftSum(12), DriftSum(12, weight)
    held = np.isin(np.arange(200), [3, 4, 5, 100, 199])
    for start in range(0, 200, piece):
        own = slice(start, start + piece)
        alone.update(exact[own], inputs[own], held[own])
        added.update(exact[own], inputs[own], held[own], stream[own])
    seen, moved = INPUTS[~held], (EXACT - INPUTS)[~held]
    lacking = STREAM[~held] + moved @ WEIGHT.T
    found, other = added.result(), alone.result()
    np.testing.assert_allclose(other.inputs, moved.T @ seen / 195, atol=1e-5)
    np.testing.assert_allclose(found.outputs, lacking.T @ seen / 195, atol=2e-5)
    assert found.inputs is None
    assert other.outputs is None
    assert np.array_equal(found.heldout, exact[held])
    assert np.array_equal(found.heldout_stream, stream[held])
    assert np.array_equal(other.heldout, exact[held])


@pytest.mark.parametrize("added", [False, True])
def test_what_has_not_drifted_sums_to_zero_exactly(added: bool) -> None:
    same, weight = EXACT.astype(np.float32), WEIGHT.astype(np.float32)
    sums = DriftSum(12, weight if added else None)
    sums.update(same, same, NONE, np.zeros((200, 7), np.float32) if added else None)
    found = sums.result()
    total = found.outputs if added else found.inputs
    assert total is not None
    assert not total.any()
    assert found.heldout.shape == (0, 12)


@pytest.mark.parametrize("stream", [False, True])
def test_the_held_out_error_includes_the_drift(stream: bool) -> None:
    weight = WEIGHT.astype(np.float32)
    rounded = round_to_nearest(weight, Grid(4, 4))
    exact, inputs, missing = (x[:20].astype(np.float32) for x in (EXACT, INPUTS, STREAM))
    empty = np.zeros((0, 0), np.float32)
    drift = Drift(None, exact, empty, missing) if stream else Drift(empty, exact)
    measures = measure(weight, rounded, Inputs(None, None, inputs, drift))
    wanted = exact @ weight.T
    lost = wanted - inputs @ rounded.dequantized().T + (missing if stream else 0)
    error = (lost**2).sum() / (wanted**2).sum()
    assert measures.heldout_rel_err == pytest.approx(error, rel=1e-4)
    found = error_with_rounded_inputs(
        weight, rounded, exact, inputs, stream=missing if stream else None
    )
    assert found == pytest.approx(error, rel=1e-4)


def test_a_drift_of_the_stream_is_made_up_for_as_far_as_a_map_of_it_goes() -> None:
    """The slow twin: the map in the width of the stream, fitted on one half of the tokens and
    judged on the other."""
    size = np.exp(RANDOM.standard_normal((200, 1)))
    wanted, stream = size * EXACT, size * INPUTS
    unit = np.sqrt((wanted**2).mean(1, keepdims=True))
    unit = unit * np.sqrt(((wanted / unit) ** 2).mean(0))
    inputs, needed = stream / unit, (wanted - stream) / unit
    given = np.zeros_like(needed)
    for first in (0, 1):
        known = inputs[first::2]
        hessian = known.T @ known
        damp = STREAM_DAMP * hessian.trace() / 12 * np.eye(12)
        change = np.linalg.solve(hessian + damp, known.T @ needed[first::2])
        given[1 - first :: 2] = inputs[1 - first :: 2] @ change
    strength = np.clip((needed * given).sum() / (given * given).sum(), 0, 1)
    found = corrected_stream(stream, wanted)
    np.testing.assert_allclose(found, stream + strength * unit * given, rtol=1e-9)
    assert ((found - wanted) ** 2).sum() < 0.8 * ((stream - wanted) ** 2).sum()


def test_a_loud_channel_is_not_corrected_at_the_cost_of_the_others() -> None:
    """The channels do not know of one another; the first, a hundred times as loud, lacks a tenth of
    itself, and so does each of the others."""
    loud = np.random.default_rng(2).standard_normal((200, 12)) * ([100] + [1] * 11)
    gaps = np.random.default_rng(3).standard_normal((200, 12)) * ([1] + [0.01] * 11)
    stream = 0.9 * loud + gaps
    left = ((corrected_stream(stream, loud) - loud) ** 2).sum(axis=0)
    assert (left < 0.5 * ((stream - loud) ** 2).sum(axis=0)).all()


def test_a_drift_that_no_map_explains_stays() -> None:
    noisy = EXACT + 0.1 * np.random.default_rng(1).standard_normal(EXACT.shape)
    left = corrected_stream(noisy, EXACT) - EXACT
    assert 0.9 < (left**2).sum() / ((noisy - EXACT) ** 2).sum() <= 1


@pytest.mark.parametrize("n_tokens", [0, 1, 3])
@pytest.mark.parametrize("value", [0.0, 1.0, np.inf])
def test_a_stream_of_a_few_tokens_or_of_one_value_is_corrected(n_tokens: int, value: float) -> None:
    stream = np.full((n_tokens, 12), value, np.float32)
    found = corrected_stream(stream, np.ones((n_tokens, 12), np.float32))
    assert found.shape == stream.shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all() == (value < np.inf or n_tokens == 0)
