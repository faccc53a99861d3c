"""The engine against the loop of the GPTQ paper and against its own promises.

Codes are compared on asymmetric grids, the loss on symmetric ones: there the most negative weight
of a group sits on a rounding tie, and the last bit of a float decides.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.errors import InputError
from ptq_cli.numerics import gptq, panel, refit
from ptq_cli.numerics.feedback import column_order, make_feedback
from ptq_cli.numerics.gptq import solve
from ptq_cli.numerics.integers import SEARCH_RATIOS
from ptq_cli.numerics.ldl import NotPositiveDefinite
from ptq_cli.numerics.panel import Panel, Passes
from ptq_cli.numerics.rounding import round_to_nearest
from tests import oracles
from tests.numerics.cases import DAMP, damped, some_hessian, some_weight

ORDERS = ("none", "static", "desc")
PLAIN = Passes(mse=False, refine=0, sweeps=0)
THOROUGH = Passes(mse=True, refine=2, sweeps=2)


def run(weight, hessian, grid, act_order="none", passes=PLAIN, damp=DAMP):
    feedback = make_feedback(hessian, damp, grid, act_order, passes.refine > 0)
    return solve(weight, grid, feedback, passes)


def run_twin(weight, hessian, grid, act_order="none", passes=PLAIN, damp=DAMP):
    return oracles.gptq(
        weight,
        hessian,
        grid,
        damp=damp,
        act_order=act_order,
        ratios=SEARCH_RATIOS if passes.mse else (1.0,),
        refine=passes.refine,
        sweeps=passes.sweeps,
    )


def assert_equal_to_twin(result, twin):
    np.testing.assert_array_equal(result.codes, twin.codes)
    np.testing.assert_array_equal(result.scales.astype(np.float64), twin.scales)
    np.testing.assert_array_equal(result.zeros, twin.zeros)
    np.testing.assert_array_equal(result.column_groups(), twin.groups)


def dequantized(result):
    """In float64, scales as they are stored."""
    groups = result.column_groups()
    centred = result.codes - result.zeros.astype(np.float64)[:, groups]
    return result.scales.astype(np.float64)[:, groups] * centred


def loss_of(result, weight, hessian):
    return oracles.loss(weight, dequantized(result), hessian)


# ---- the paper's loop ----


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_papers_loop(bits, act_order):
    weight, hessian = some_weight(6, 48), some_hessian(48)
    grid = Grid(bits, group_size=16, sym=False)
    result = run(weight, hessian, grid, act_order)
    assert_equal_to_twin(result, run_twin(weight, hessian, grid, act_order))


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("group_size", [-1, 0, 1, 3, 16, 24, 50, 64])
@pytest.mark.parametrize("passes", [PLAIN, THOROUGH], ids=["plain", "thorough"])
def test_every_group_size_equals_the_twin(group_size, act_order, passes):
    """A row (-1), the whole tensor (0), one column, groups that leave a short last one, a group
    larger than the row."""
    weight, hessian = some_weight(5, 50, seed=1), some_hessian(50, seed=1)
    grid = Grid(3, group_size, sym=False)
    result = run(weight, hessian, grid, act_order, passes)
    assert result.scales.shape == grid.scales_shape(weight.shape)
    assert_equal_to_twin(result, run_twin(weight, hessian, grid, act_order, passes))


@pytest.mark.parametrize("in_features", [1, 2, 15, 16, 17, 31, 33, 80])
@pytest.mark.parametrize("passes", [PLAIN, THOROUGH], ids=["plain", "thorough"])
def test_columns_across_leaves_and_halves(in_features, passes):
    """Leaves are 16 columns; a group of 80 is halved unevenly, twice."""
    weight, hessian = some_weight(4, in_features), some_hessian(in_features)
    grid = Grid(4, group_size=-1, sym=False)
    result = run(weight, hessian, grid, passes=passes)
    assert_equal_to_twin(result, run_twin(weight, hessian, grid, passes=passes))


def test_many_groups_are_halved_unevenly():
    weight, hessian = some_weight(3, 77), some_hessian(77)
    grid = Grid(2, group_size=7, sym=False)
    for act_order in ORDERS:
        result = run(weight, hessian, grid, act_order, THOROUGH)
        assert_equal_to_twin(result, run_twin(weight, hessian, grid, act_order, THOROUGH))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scales_are_optimised_as_they_are_stored(scale_dtype):
    weight, hessian = some_weight(6, 40), some_hessian(40)
    grid = Grid(3, group_size=16, sym=False, scale_dtype=scale_dtype)
    result = run(weight, hessian, grid, "static", THOROUGH)
    assert result.scales.dtype.name == scale_dtype
    assert_equal_to_twin(result, run_twin(weight, hessian, grid, "static", THOROUGH))


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("passes", [PLAIN, THOROUGH], ids=["plain", "thorough"])
def test_dead_columns_equal_the_twin(act_order, passes):
    """Channels that were never active, a whole group of them among others."""
    dead = [0, 3, 17, *range(24, 32), 39]
    weight, hessian = some_weight(5, 40), some_hessian(40, dead=dead)
    grid = Grid(4, group_size=8, sym=False)
    result = run(weight, hessian, grid, act_order, passes)
    assert_equal_to_twin(result, run_twin(weight, hessian, grid, act_order, passes))


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("group_size", [-1, 0, 1, 3, 16, 50])
@pytest.mark.parametrize("passes", [PLAIN, THOROUGH], ids=["plain", "thorough"])
def test_mirrored_groups_are_the_twins(group_size, act_order, passes):
    """Groups with the longer side below zero and above it, in one weight; scales are positive."""
    weight, hessian = some_weight(5, 50, seed=1), some_hessian(50, seed=1)
    for bits in (3, 8):
        grid = Grid(bits, group_size, mirrored=True)
        result = run(weight, hessian, grid, act_order, passes)
        assert_equal_to_twin(result, run_twin(weight, hessian, grid, act_order, passes))
        assert set(result.zeros.flat) <= {2 ** (bits - 1) - 1, 2 ** (bits - 1)}
        assert len(set(result.zeros.flat)) == 2 or group_size == 0
        assert (result.scales > 0).all()


def test_mirrored_groups_lower_the_loss():
    weight, hessian = some_weight(64, 64), some_hessian(64)
    for bits, part in ((2, 0.9), (3, 0.93), (4, 0.97)):
        grid = Grid(bits, 16)
        usual, mirrored = (
            loss_of(run(weight, hessian, own, "static", THOROUGH), weight, hessian)
            for own in (grid, replace(grid, mirrored=True))
        )
        assert mirrored < part * usual


@pytest.mark.parametrize("narrow_range", [False, True])
@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("passes", [PLAIN, THOROUGH], ids=["plain", "thorough"])
def test_symmetric_loss_is_the_twins(narrow_range, act_order, passes):
    weight, hessian = some_weight(6, 50), some_hessian(50)
    for bits in (2, 3, 4, 8):
        grid = Grid(bits, group_size=16, sym=True, narrow_range=narrow_range)
        result = run(weight, hessian, grid, act_order, passes)
        twin = run_twin(weight, hessian, grid, act_order, passes)
        expected = oracles.loss(weight, twin.weight, hessian)
        assert loss_of(result, weight, hessian) == pytest.approx(expected, rel=1e-9)
        assert (result.zeros == 2 ** (bits - 1)).all()


def test_identity_hessian_rounds_to_nearest():
    """Nothing to compensate: GPTQ is plain rounding."""
    weight = some_weight(6, 40)
    grid = Grid(4, group_size=16, sym=False)
    result, nearest = run(weight, np.eye(40), grid), round_to_nearest(weight, grid)
    np.testing.assert_array_equal(result.codes, nearest.codes)
    np.testing.assert_array_equal(result.scales, nearest.scales)
    np.testing.assert_array_equal(result.zeros, nearest.zeros)


# ---- the order of the columns ----


def test_static_visits_heavy_groups_first_and_leaves_groups_where_they_are():
    hessian = np.diag([1.0, 2.0, 9.0, 8.0, 5.0, 6.0, 10.0])
    grid = Grid(4, group_size=2, sym=False)
    assert column_order(hessian, "static", grid).tolist() == [2, 3, 5, 4, 6, 1, 0]
    assert run(some_weight(2, 7), hessian, grid, "static").g_idx is None


def test_desc_forms_groups_in_the_order_of_the_visit():
    hessian = np.diag([1.0, 2.0, 9.0, 8.0, 5.0, 6.0, 10.0])
    grid = Grid(4, group_size=2, sym=False)
    assert column_order(hessian, "desc", grid).tolist() == [6, 2, 3, 5, 4, 1, 0]
    g_idx = run(some_weight(2, 7), hessian, grid, "desc").g_idx
    assert g_idx.dtype == np.int32
    assert g_idx.tolist() == [3, 2, 0, 1, 2, 1, 0]


def test_columns_of_equal_weight_keep_their_order():
    for act_order in ORDERS:
        order = column_order(np.eye(9), act_order, Grid(4, group_size=4))
        assert order.tolist() == list(range(9))


# ---- refinement and sweeps ----


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize(("refine", "sweeps"), [(1, 0), (3, 0), (0, 1), (0, 3), (1, 1)])
def test_refine_and_sweeps_equal_the_twin(refine, sweeps, mse, act_order):
    weight, hessian = some_weight(6, 44, seed=2), some_hessian(44, seed=2)
    grid, passes = Grid(2, group_size=20, sym=False), Passes(mse, refine, sweeps)
    result = run(weight, hessian, grid, act_order, passes)
    assert_equal_to_twin(result, run_twin(weight, hessian, grid, act_order, passes))


@pytest.mark.parametrize("sym", [False, True])
def test_refining_never_raises_the_cost_of_a_row(sym):
    """With one group in a row, its cost is the loss over `H + λI`."""
    weight, hessian = some_weight(8, 37), some_hessian(37)
    for bits in (2, 3, 4):
        losses = row_losses(weight, hessian, Grid(bits, -1, sym), "refine")
        assert (losses[1:] <= losses[:-1] * (1 + 1e-12)).all()
        assert losses[-1].sum() < losses[0].sum()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("act_order", ORDERS)
def test_sweeping_never_raises_the_loss(sym, act_order):
    weight, hessian = some_weight(8, 50), some_hessian(50)
    for bits in (2, 3, 4):
        losses = row_losses(weight, hessian, Grid(bits, 12, sym), "sweeps", act_order)
        assert (losses[1:] <= losses[:-1] * (1 + 1e-12)).all()
        assert losses[-1].sum() < losses[0].sum()


def row_losses(weight, hessian, grid, what, act_order="none"):
    """Loss over `H + λI` of each row after 0 … 4 passes, [passes, rows]."""
    losses = []
    for n in range(5):
        passes = Passes(**{"mse": False, "refine": 0, "sweeps": 0, what: n})
        result = run(weight, hessian, grid, act_order, passes)
        error = weight - dequantized(result)
        losses.append(((error @ damped(hessian)) * error).sum(axis=1))
    return np.array(losses)


def test_every_pass_lowers_the_cost_it_was_given(monkeypatch):
    """`tr(E S Eᵀ) + 2 tr(E Cᵀ)` of each group and row, where `P = E S + C` is the half gradient
    the engine handed in."""
    descend, rises = Panel._descend, []

    def watched(own, block, quadratic, gradient, centred):
        group = block.columns
        constant = gradient - quadratic @ own.error[group]

        def cost():
            error = own.error[group]
            return (error * (quadratic @ error + 2 * constant)).sum(axis=0)

        before = cost()
        descend(own, block, quadratic, gradient, centred)
        rises.append((cost() - before).max() / np.abs(before).max())

    monkeypatch.setattr(Panel, "_descend", watched)
    weight, hessian = some_weight(16, 72), some_hessian(72)
    for sym in (False, True):
        for bits in (2, 3, 4):
            run(weight, hessian, Grid(bits, 20, sym), "static", THOROUGH)
    assert len(rises) == 6 * 4 * (THOROUGH.refine + THOROUGH.sweeps)
    assert max(rises) <= 1e-12
    assert min(rises) < 0


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_inputs_of_low_rank_equal_the_twin(rank):
    """Strongly coupled columns pull whole groups past zero: the best scale for their codes would
    be negative, and the old one stays."""
    weight = some_weight(64, 24)
    for group_size in (6, 8, 12):
        inputs = np.random.default_rng((group_size, rank)).normal(size=(rank, 24))
        grid, passes = Grid(2, group_size, sym=False), Passes(mse=False, refine=1, sweeps=2)
        result = run(weight, inputs.T @ inputs, grid, passes=passes, damp=0.001)
        twin = run_twin(weight, inputs.T @ inputs, grid, passes=passes, damp=0.001)
        assert_equal_to_twin(result, twin)


def test_a_refit_is_kept_only_where_the_cost_falls(monkeypatch):
    """Rounding to the nearest stored scale can hardly raise the cost; a coarser one could."""
    weight, hessian = some_weight(8, 37), some_hessian(37)
    monkeypatch.setattr(refit, "round_scales", lambda scales, grid: 2 ** np.ceil(np.log2(scales)))
    for what in ("refine", "sweeps"):
        losses = row_losses(weight, hessian, Grid(3, -1, sym=False), what)
        assert (losses[1:] <= losses[:-1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize(("refine", "group_size"), [(0, 12), (2, 12), (1, -1)])
def test_sweeps_end_where_the_twins_do(monkeypatch, refine, group_size, act_order):
    weight, hessian = some_weight(6, 48, seed=3), some_hessian(48, seed=3)
    grid, passes = Grid(2, group_size, sym=False), Passes(False, refine, sweeps=50)
    swept = []
    sweep_block = Panel._sweep_block
    monkeypatch.setattr(
        Panel, "_sweep_block", lambda own, block: swept.append(block) or sweep_block(own, block)
    )
    result = run(weight, hessian, grid, act_order, passes)
    assert_equal_to_twin(result, run_twin(weight, hessian, grid, act_order, passes))
    least = 2 * (48 // 12 if group_size > 0 else 1)
    assert least <= len(swept) < 25 * least


@pytest.mark.parametrize(("group_size", "refine"), [(16, 0), (16, 2), (0, 1), (-1, 0)])
def test_the_loss_that_sweeps_end_by_is_that_of_the_error(monkeypatch, group_size, refine):
    """Made up of `Σ_k D_k |(E U)_k|²`, less what each sweep gained."""
    monkeypatch.setattr(panel, "LEAST_GAIN", 0)
    weight, hessian = some_weight(8, 64), some_hessian(64)
    grid = Grid(2, group_size, sym=False)
    feedback = make_feedback(hessian, DAMP, grid, "static")
    fixed = None if group_size else (np.full((1, 8), 0.03), np.full((1, 8), 2.0))
    ordered = np.ascontiguousarray(weight.T[feedback.order])
    for sweeps in (3, 6):
        solved = Panel(ordered, grid, feedback, Passes(True, refine, sweeps), fixed)
        solved.run()
        quadratic = damped(hessian)[np.ix_(feedback.order, feedback.order)]
        expected = ((quadratic @ solved.error) * solved.error).sum()
        assert solved.loss == pytest.approx(expected, rel=1e-9)


def test_each_panel_sweeps_as_if_it_were_alone(monkeypatch):
    """Panels are of one size, so the bytes do not depend on who works on them."""
    weight, hessian = some_weight(12, 48), some_hessian(48)
    grid, passes = Grid(3, 16, sym=False), Passes(sweeps=10)
    monkeypatch.setattr(gptq, "each", lambda work, panels: [work(own) for own in [*panels][::-1]])
    feedback = make_feedback(hessian, DAMP, grid, "static")
    whole = solve(weight, grid, feedback, passes, panel_rows=4)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        alone = solve(weight[rows], grid, feedback, passes)
        np.testing.assert_array_equal(whole.codes[rows], alone.codes)
        np.testing.assert_array_equal(whole.scales[rows], alone.scales)


def test_compensation_beats_rounding_and_refinement_beats_both():
    weight, hessian = some_weight(32, 96), some_hessian(96)
    for bits in (2, 3, 4):
        grid = Grid(bits, group_size=32, sym=False)
        nearest = loss_of(round_to_nearest(weight, grid), weight, hessian)
        plain = loss_of(run(weight, hessian, grid), weight, hessian)
        thorough = loss_of(run(weight, hessian, grid, passes=THOROUGH), weight, hessian)
        assert thorough < plain < nearest


def test_a_whole_tensor_grid_is_never_refitted():
    """Rows are worked on apart, so none may move the scale they share."""
    weight, hessian = some_weight(6, 40), some_hessian(40)
    grid = Grid(3, group_size=0, sym=False)
    nearest, result = round_to_nearest(weight, grid), run(weight, hessian, grid)
    assert result.scales.shape == result.zeros.shape == (1, 1)
    assert result.scales == nearest.scales
    refined = run(weight, hessian, grid, passes=Passes(mse=False, refine=2, sweeps=1))
    assert refined.scales == nearest.scales
    assert loss_of(refined, weight, hessian) < loss_of(result, weight, hessian)


# ---- panels and dtypes ----


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("act_order", ORDERS)
def test_results_do_not_depend_on_the_panels(monkeypatch, act_order, group_size):
    weight, hessian = some_weight(11, 40), some_hessian(40)
    grid = Grid(3, group_size, sym=False)
    whole = run(weight, hessian, grid, act_order, THOROUGH)
    for rows in (1, 2, 4, 11):
        monkeypatch.setattr(gptq, "PANEL_ROWS", rows)
        result = run(weight, hessian, grid, act_order, THOROUGH)
        np.testing.assert_array_equal(result.codes, whole.codes)
        np.testing.assert_array_equal(result.scales, whole.scales)
        np.testing.assert_array_equal(result.zeros, whole.zeros)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("act_order", ORDERS)
def test_float32_is_as_good_as_float64(sym, act_order):
    weight, hessian = some_weight(64, 96), some_hessian(96)
    for bits in (2, 4, 8):
        grid = Grid(bits, group_size=32, sym=sym)
        exact = run(weight, hessian, grid, act_order, THOROUGH)
        single = run(weight.astype("f4"), hessian.astype("f4"), grid, act_order, THOROUGH)
        expected = loss_of(exact, weight, hessian)
        assert loss_of(single, weight, hessian) == pytest.approx(expected, rel=0.02)


def test_inputs_are_left_alone():
    weight, hessian = some_weight(5, 40), some_hessian(40)
    before = weight.copy(), hessian.copy()
    for act_order in ORDERS:
        run(weight, hessian, Grid(3, 16, sym=False), act_order, THOROUGH)
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(hessian, before[1])


def test_any_memory_order_gives_the_same_bytes():
    weight, hessian = some_weight(9, 40), some_hessian(40)
    grid = Grid(3, 16, sym=False)
    result = run(weight, hessian, grid, passes=THOROUGH)
    fortran = run(np.asfortranarray(weight), np.asfortranarray(hessian), grid, passes=THOROUGH)
    np.testing.assert_array_equal(result.codes, fortran.codes)
    assert result.codes.flags.c_contiguous
    assert result.scales.flags.c_contiguous


# ---- the edges ----


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("passes", [PLAIN, THOROUGH], ids=["plain", "thorough"])
def test_zero_rows_have_scale_one_and_no_error(sym, passes):
    weight, hessian = some_weight(5, 40), some_hessian(40)
    weight[[0, 3]] = 0
    for act_order in ORDERS:
        result = run(weight, hessian, Grid(4, 16, sym), act_order, passes)
        assert (result.scales[[0, 3]] == 1).all()
        assert (result.dequantized()[[0, 3]] == 0).all()


def test_a_zero_group_in_the_middle_may_take_up_errors():
    """Later groups compensate earlier ones even where their own weights are zero."""
    weight, hessian = some_weight(6, 48), some_hessian(48)
    weight[:, 16:32] = 0
    grid = Grid(3, 16, sym=False)
    result = run(weight, hessian, grid, passes=THOROUGH)
    assert_equal_to_twin(result, run_twin(weight, hessian, grid, passes=THOROUGH))


@pytest.mark.parametrize("value", [0.37, -0.37])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_constant_weights_are_hit_within_half_a_step(value, group_size):
    weight = np.full((3, 20), value)
    result = run(weight, some_hessian(20), Grid(4, group_size, sym=False), passes=THOROUGH)
    error = np.abs(weight - result.dequantized())
    assert error.max() <= float(result.scales.max()) / 2


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 0, 1, 128])
def test_one_by_one(sym, group_size):
    weight, hessian = np.array([[-0.3]]), np.array([[2.0]])
    result = run(weight, hessian, Grid(4, group_size, sym), passes=THOROUGH)
    assert result.codes.shape == result.scales.shape == result.zeros.shape == (1, 1)
    assert abs(result.dequantized()[0, 0] + 0.3) <= float(result.scales[0, 0]) / 2 * 1.01


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("group_size", [-1, 0, 1, 16])
def test_no_rows(group_size, act_order):
    grid = Grid(4, group_size)
    result = run(np.zeros((0, 24)), some_hessian(24), grid, act_order, THOROUGH)
    assert result.codes.shape == (0, 24)
    assert result.scales.shape == result.zeros.shape == grid.scales_shape((0, 24))
    assert result.dequantized().shape == (0, 24)


def test_narrow_range_keeps_codes_off_the_edge():
    weight, hessian = some_weight(16, 64), some_hessian(64)
    for bits in (2, 4, 8):
        grid = Grid(bits, 16, narrow_range=True)
        codes = run(weight, hessian, grid, "static", THOROUGH).codes.astype(int) - 2 ** (bits - 1)
        assert np.abs(codes).max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("passes", [PLAIN, THOROUGH], ids=["plain", "thorough"])
def test_tiny_weights_stay_finite(passes):
    """Below float16's smallest subnormal the grid is coarser than asked, never 0 or NaN."""
    weight, hessian = some_weight(4, 32) * 1e-8, some_hessian(32)
    for dtype in (np.float32, np.float64):
        result = run(weight.astype(dtype), hessian.astype(dtype), Grid(4, 16), passes=passes)
        assert (result.scales > 0).all()
        assert np.isfinite(result.dequantized()).all()


@pytest.mark.parametrize("passes", [PLAIN, THOROUGH], ids=["plain", "thorough"])
def test_a_scale_that_float16_cannot_hold_is_an_error(passes):
    weight, hessian = some_weight(4, 32) * 1e9, some_hessian(32)
    with pytest.raises(InputError, match="does not fit float16") as caught:
        run(weight, hessian, Grid(4, 16), passes=passes)
    assert caught.value.hint == "--scale-dtype float32"
    assert np.isfinite(run(weight, hessian, Grid(4, 16, scale_dtype="float32")).scales).all()


def test_a_refit_never_leaves_the_stored_dtype():
    """Near float16's largest scale a refit that would pass it is not kept; it is no error."""
    grid = Grid(2, -1, sym=True, narrow_range=True)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weight = np.clip(rng.normal(size=(8, 12)) * 60000, -65504, 65504)
        result = run(weight, some_hessian(12, seed), grid, passes=THOROUGH)
        assert np.isfinite(result.dequantized()).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sym", [False, True])
def test_weights_that_are_no_numbers_are_an_error(bad, sym):
    weight = some_weight(4, 32)
    weight[2, 20] = bad
    with pytest.raises(InputError):
        run(weight, some_hessian(32), Grid(4, 16, sym))


def test_damping_is_a_share_of_the_mean_diagonal():
    hessian = np.diag([1.0, 3.0])
    feedback = make_feedback(hessian, 0.5, Grid(4), "desc")
    np.testing.assert_array_equal(feedback.rows(0, 2), [[4.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(feedback.pivots, [4.0, 2.0])


def test_a_singular_hessian_needs_damping():
    hessian = some_hessian(8, dead=[3])
    with pytest.raises(NotPositiveDefinite):
        make_feedback(hessian, 0.0, Grid(4), "none")
    make_feedback(hessian, DAMP, Grid(4), "none")


def test_what_groups_need_of_the_hessian_is_made_once():
    """Whatever the panels: the products and inverses of a site are in its feedback."""
    hessian, grid = some_hessian(40), Grid(4, 16)
    feedback = make_feedback(hessian, DAMP, grid, "static")
    starts = [0, *np.flatnonzero(np.diff(feedback.order // 16)) + 1, 40]
    assert [group.columns for group in feedback.groups] == [
        slice(a, b) for a, b in pairwise(starts)
    ]
    for block in feedback.blocks:
        own, (group,) = block.columns, block.groups
        upper, pivots = feedback.upper[own, own], feedback.pivots[own]
        np.testing.assert_allclose(block.schur, upper * pivots @ upper.T)
        if own.start:
            np.testing.assert_allclose(group.inverse.T @ upper, np.eye(len(pivots)), atol=1e-12)
    assert feedback.groups[0].inverse is None
    assert make_feedback(hessian, DAMP, grid, "static", False).blocks[0].schur.size == 0
