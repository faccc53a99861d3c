"""The correction for drifted inputs, against the least squares it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.numerics.drift import DriftSum, corrected
from ptq_cli.numerics.gptq import make_feedback
from ptq_cli.numerics.output_errors import measure
from ptq_cli.numerics.rounding import round_to_nearest

RANDOM = np.random.default_rng(3)
EXACT = RANDOM.standard_normal((200, 12))
INPUTS = EXACT + 0.3 * RANDOM.standard_normal((200, 12)) @ RANDOM.standard_normal((12, 12))
WEIGHT = RANDOM.standard_normal((7, 12))


def drift_of(exact: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    return (exact - inputs).T @ inputs / len(inputs)


def target(damp: float, strength: float, act_order: str = "none") -> np.ndarray:
    feedback = make_feedback(INPUTS.T @ INPUTS / len(INPUTS), damp, Grid(4, 4), act_order)
    return corrected(WEIGHT, drift_of(EXACT, INPUTS), feedback, strength)


@pytest.mark.parametrize("act_order", ["none", "static", "desc"])
@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_the_target_is_the_least_squares_one_held_to_the_weight(
    damp: float, act_order: str
) -> None:
    hessian = INPUTS.T @ INPUTS / len(INPUTS)
    root = np.sqrt(damp * hessian.diagonal().mean() * len(INPUTS))
    rows = np.vstack([INPUTS, root * np.eye(12)])
    wanted = np.vstack([EXACT @ WEIGHT.T, root * WEIGHT.T])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = target(damp, 1.0, act_order)
    np.testing.assert_allclose(found, solution, rtol=1e-9, atol=1e-12)


def test_strength_lies_between_the_weight_and_the_target() -> None:
    before = WEIGHT.copy()
    whole = target(0.01, 1.0) - WEIGHT
    np.testing.assert_allclose(target(0.01, 0.25) - WEIGHT, whole / 4, atol=1e-12)
    assert np.array_equal(target(0.01, 0.0), WEIGHT)
    assert np.array_equal(WEIGHT, before)


@pytest.mark.parametrize("piece", [7, 64, 200])
def test_sums_leave_out_the_held_out_tokens(piece: int) -> None:
    sums = DriftSum(12, every=8, limit=10)
    exact, inputs = EXACT.astype(np.float32), INPUTS.astype(np.float32)
    for start in range(0, 200, piece):
        sums.update(exact[start : start + piece], inputs[start : start + piece])
    matrix, heldout = sums.result()
    held = [token for token in range(200) if token % 8 == 7][:10]
    kept = np.delete(np.arange(200), held)
    np.testing.assert_allclose(matrix, drift_of(EXACT[kept], INPUTS[kept]), atol=1e-5)
    assert np.array_equal(heldout, exact[held])


def test_what_has_not_drifted_sums_to_zero_exactly() -> None:
    sums = DriftSum(12, every=0, limit=0)
    same = EXACT.astype(np.float32)
    sums.update(same, same)
    matrix, heldout = sums.result()
    assert not matrix.any()
    assert heldout.shape == (0, 12)


def test_the_held_out_error_includes_the_drift() -> None:
    weight = WEIGHT.astype(np.float32)
    rounded = round_to_nearest(weight, Grid(4, 4))
    exact, inputs = EXACT[:20].astype(np.float32), INPUTS[:20].astype(np.float32)
    measures = measure(weight, rounded, None, inputs, heldout_float=exact)
    wanted = exact @ weight.T
    lost = wanted - inputs @ rounded.dequantized().T
    assert measures.heldout_rel_err == pytest.approx((lost**2).sum() / (wanted**2).sum(), rel=1e-4)
