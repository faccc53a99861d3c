"""Rows that make up for one another, against the loss and the loop that it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.core.statistics import Coupling
from ptq_cli.numerics.coupling import DAMPING, make_coupling, solve_coupled
from ptq_cli.numerics.feedback import make_feedback
from ptq_cli.numerics.gptq import solve
from ptq_cli.numerics.panel import Passes
from ptq_cli.numerics.parallel import use_threads

RANDOM = np.random.default_rng(11)
ROWS, COLUMNS = 22, 32
MIX = RANDOM.standard_normal((ROWS, 4))
FISHER = (MIX @ MIX.T + 0.01 * np.eye(ROWS)).astype(np.float32)
INPUTS = RANDOM.standard_normal((200, 6)) @ RANDOM.standard_normal((6, COLUMNS))
HESSIAN = INPUTS.T @ INPUTS / 200 + 0.1 * np.eye(COLUMNS)
WEIGHT = RANDOM.standard_normal((ROWS, COLUMNS))
GRID = Grid(3, 16)


def coupling_of(fisher: np.ndarray, levels: int) -> Coupling:
    found = make_coupling(fisher, levels)
    assert found is not None
    return found


@pytest.mark.parametrize("levels", [1, 4, 5, ROWS])
def test_the_factor_gives_the_damped_fisher_back(levels: int) -> None:
    coupling = coupling_of(FISHER, levels)
    damped = FISHER / FISHER.diagonal().mean() + DAMPING * np.eye(ROWS)
    upper = coupling.upper.astype(np.float64)
    starts = [0, *coupling.stops[:-1]]
    blocks = np.linalg.inv(upper) @ damped[np.ix_(coupling.order, coupling.order)]
    blocks = blocks @ np.linalg.inv(upper).T
    for start, stop in zip(starts, coupling.stops, strict=True):
        np.testing.assert_allclose(upper[start:stop, start:stop], np.eye(stop - start), atol=1e-5)
        assert not upper[stop:, start:stop].any()
        blocks[start:stop, start:stop] = 0
    assert np.abs(blocks).max() < 1e-5
    assert sorted(coupling.order) == list(range(ROWS))
    assert len(coupling.stops) == levels


def test_every_level_is_rounded_at_what_the_levels_before_it_leave() -> None:
    """With plain rounding in place of GPTQ, in the plainest loop."""
    feedback = make_feedback(np.eye(COLUMNS), 0.0, GRID, "none")
    coupling = coupling_of(FISHER, ROWS)  # a level a row
    found = solve_coupled(WEIGHT, GRID, feedback, Passes(False, 0, 0), coupling)
    upper = coupling.upper.astype(np.float64)
    errors: list[np.ndarray] = []
    for place, row in enumerate(coupling.order):
        target = WEIGHT[row] + sum(upper[k, place] * errors[k] for k in range(place))
        rounded = solve(target[None], GRID, feedback, Passes(False, 0, 0)).dequantized()[0]
        np.testing.assert_array_equal(found.dequantized()[row], rounded)
        errors.append(WEIGHT[row] - rounded)


@pytest.mark.parametrize("passes", [Passes(False, 0, 0), Passes()])
@pytest.mark.parametrize("act_order", ["none", "static", "desc"])
def test_the_loss_that_it_stands_for_falls(passes: Passes, act_order: str) -> None:
    feedback = make_feedback(HESSIAN, 0.01, GRID, act_order)

    def loss(rounded: np.ndarray, fisher: np.ndarray = FISHER) -> float:
        error = WEIGHT - rounded
        return float(np.vdot(fisher @ error, error @ HESSIAN))

    plain = solve(WEIGHT, GRID, feedback, passes)
    found = solve_coupled(WEIGHT, GRID, feedback, passes, coupling_of(FISHER, 8))
    assert loss(found.dequantized()) < 0.8 * loss(plain.dequantized())
    if found.g_idx is not None:
        assert np.array_equal(found.g_idx, plain.g_idx)


def test_rows_that_do_not_matter_to_one_another_are_as_without() -> None:
    feedback = make_feedback(HESSIAN, 0.01, GRID, "static")
    coupling = coupling_of(np.eye(ROWS, dtype=np.float32), 8)
    found = solve_coupled(WEIGHT, GRID, feedback, Passes(), coupling)
    plain = solve(WEIGHT, GRID, feedback, Passes())
    assert np.array_equal(found.codes, plain.codes)
    assert np.array_equal(found.scales, plain.scales)


def test_bytes_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq_cli.numerics.coupling.PANEL_ROWS", 8)
    feedback = make_feedback(HESSIAN, 0.01, GRID, "static")
    coupling = coupling_of(FISHER, 4)
    one = solve_coupled(WEIGHT, GRID, feedback, Passes(), coupling)
    with use_threads(3):
        other = solve_coupled(WEIGHT, GRID, feedback, Passes(), coupling)
    assert np.array_equal(one.codes, other.codes)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_fisher_that_says_nothing_couples_nothing(value: float) -> None:
    assert make_coupling(np.full((4, 4), value, np.float32)) is None


def test_fewer_rows_than_levels() -> None:
    coupling = coupling_of(FISHER[:3, :3], 8)
    assert coupling.stops == (1, 2, 3)


def test_a_fisher_that_cannot_be_factored_couples_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq_cli.numerics.coupling.DAMPING", 0.0)
    assert make_coupling(np.ones((8, 8), np.float32)) is None
