"""Numbers whose scales are multiples of a super-block's, or that have offsets of their own, against
plain loops."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from ptq_cli.core.grid import SUPER_BLOCK
from ptq_cli.errors import InputError
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.methods.gptq import METHOD
from ptq_cli.numerics import super_blocks
from ptq_cli.numerics.feedback import column_order, make_feedback
from ptq_cli.numerics.gptq import solve
from ptq_cli.numerics.panel import Panel, Passes
from ptq_cli.numerics.range_search import search_offsets, search_signed
from ptq_cli.numerics.refit import Sums
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.super_blocks import Multiples, Shared
from tests.numerics.cases import DAMP, damped, some_hessian, some_weight

MULTIPLES = [name for name, kind in TYPES.items() if kind.grid.multiples]
NEW = [*MULTIPLES, "Q4_1", "Q5_1", "IQ4_NL"]
PLAIN = Passes(mse=False, refine=0, sweeps=0)
THOROUGH = Passes(mse=True, refine=2, sweeps=2)


def levels_of(grid):
    """Every level there is, in the order of the codes."""
    if grid.table is not None:
        return grid.table.astype(np.float64)
    middle = 0 if grid.own_offsets else grid.mid_code
    return np.arange(grid.max_code + 1.0) - middle


def plain_fit(group, grid):
    """The scale and offset of a group's whole range, in floats."""
    if grid.own_offsets:
        low = min(group.min(), 0) if grid.multiples else group.min()
        return (group.max() - low) / grid.max_code, low
    farthest = max(group, key=abs)
    return farthest / levels_of(grid)[0], 0.0


def plain_shared(fits, grid):
    """d and e of a super-block, from what fits its groups."""
    least, most = grid.multiples
    scales, offsets = np.array(fits).T
    scale = max(scales, key=abs) / (least or most)
    stored = (float(np.float16(value)) for value in (scale, max(-offsets) / most))
    return [value or 2.0**-24 for value in stored]


def stored_fit(scale, offset, shared, grid):
    """A group's scale and offset as they are stored."""
    if not grid.multiples:
        return float(np.float16(scale)), float(np.float16(offset))
    least, most = grid.multiples
    d, e = shared
    n, m = round(np.clip(scale / d, least, most)), round(np.clip(-offset / e, 0, most))
    return d * n, -e * m


def nearest(value, scale, offset, grid):
    """The level nearest to a weight."""
    levels = levels_of(grid)
    return levels[np.abs((value - offset) / (scale or 1) - levels).argmin()]


def blocks_of(n, grid):
    size = SUPER_BLOCK if grid.multiples else grid.group_size
    groups = [np.arange(start, start + grid.group_size) for start in range(0, n, grid.group_size)]
    per = size // grid.group_size
    return [groups[i : i + per] for i in range(0, len(groups), per)]


@pytest.mark.parametrize("kind", NEW)
def test_plain_rounding_equals_the_loops(kind):
    grid, weight = TYPES[kind].grid, some_weight(3, 512)
    result = round_to_nearest(weight, grid).dequantized()
    for row, found in zip(weight, result, strict=True):
        for groups in blocks_of(512, grid):
            fits = [plain_fit(row[group], grid) for group in groups]
            shared = plain_shared(fits, grid) if grid.multiples else None
            for group, fit in zip(groups, fits, strict=True):
                scale, offset = stored_fit(*fit, shared, grid)
                expected = [scale * nearest(x, scale, offset, grid) + offset for x in row[group]]
                np.testing.assert_allclose(found[group], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("act_order", ["none", "static"])
@pytest.mark.parametrize("kind", NEW)
def test_gptq_equals_the_loops(kind, act_order):
    """Column by column, each at its target; a super-block's scales are found when it is entered, a
    group's when it is, both for what is left to round once all errors before are made up for."""
    grid, weight, hessian = TYPES[kind].grid, some_weight(2, 512), some_hessian(512)
    feedback = make_feedback(hessian, DAMP, grid, act_order, refine=False)
    result = solve(weight, grid, feedback, PLAIN).dequantized()
    order, upper = feedback.order, feedback.upper
    for row, found in zip(weight, result, strict=True):
        error = np.zeros(512)  # in the order of visits

        def compensated(places, row=row, error=error):
            """What the columns at these places would be rounded to if nothing were lost."""
            sent = error[: places[0]] @ upper[: places[0], places[0] : places[-1] + 1]
            inside = upper[np.ix_(places, places)]
            return row[order[places]] + np.linalg.solve(inside.T, sent)

        size = SUPER_BLOCK if grid.multiples else grid.group_size
        for start in range(0, 512, size):
            starts = range(start, start + size, grid.group_size)
            groups = [np.arange(first, first + grid.group_size) for first in starts]
            whole = compensated(np.arange(start, start + size)).reshape(len(groups), -1)
            fits = [plain_fit(group, grid) for group in whole]
            shared = plain_shared(fits, grid) if grid.multiples else None
            for places in groups:
                fit = plain_fit(compensated(places), grid)
                scale, offset = stored_fit(*fit, shared, grid)
                for k in places:
                    target = row[order[k]] + error[:k] @ upper[:k, k]
                    decoded = scale * nearest(target, scale, offset, grid) + offset
                    error[k] = row[order[k]] - decoded
        np.testing.assert_allclose(row[order] - found[order], error, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", MULTIPLES)
def test_super_blocks_and_groups_stay_together_in_the_order(kind):
    grid = TYPES[kind].grid
    order = column_order(some_hessian(768), "static", grid)
    for size in (SUPER_BLOCK, grid.group_size):
        parts = (order // size).reshape(-1, size)
        assert (parts == parts[:, :1]).all()


@pytest.mark.parametrize("kind", NEW)
def test_what_is_stored_is_what_was_optimised(kind, monkeypatch):
    """After every pass the solver's errors are those of what its result decodes to."""
    panels = []
    run = Panel.run
    monkeypatch.setattr(Panel, "run", lambda panel: (run(panel), panels.append(panel)))
    grid, weight, hessian = TYPES[kind].grid, some_weight(4, 512), some_hessian(512)
    feedback = make_feedback(hessian, DAMP, grid, "static")
    result = solve(weight, grid, feedback, THOROUGH)
    error = (weight - result.dequantized())[:, feedback.order].T
    np.testing.assert_allclose(panels[0].error, error, atol=1e-8)


@pytest.mark.parametrize("kind", NEW)
def test_every_pass_lowers_the_cost_it_was_given(kind, monkeypatch):
    """`tr(E S Eᵀ) + 2 tr(E Cᵀ)` of each block and row, where `P = E S + C` is the half gradient
    the engine handed in."""
    descend, rises = Panel._descend, []

    def watched(panel, block, quadratic, gradient, levels):
        constant = gradient - quadratic @ panel.error[block.columns]

        def cost():
            error = panel.error[block.columns]
            return (error * (quadratic @ error + 2 * constant)).sum(axis=0)

        before = cost()
        descend(panel, block, quadratic, gradient, levels)
        rises.append((cost() - before).max() / np.abs(before).max())

    monkeypatch.setattr(Panel, "_descend", watched)
    grid, weight, hessian = TYPES[kind].grid, some_weight(8, 512), some_hessian(512)
    solve(weight, grid, make_feedback(hessian, DAMP, grid, "static"), THOROUGH)
    n_blocks = 512 // (SUPER_BLOCK if grid.multiples else grid.group_size)
    assert len(rises) == n_blocks * (THOROUGH.refine + THOROUGH.sweeps)
    assert max(rises) <= 1e-12
    assert min(rises) < 0


@pytest.mark.parametrize("kind", NEW)
def test_each_step_beats_the_one_before(kind):
    grid, weight, hessian = TYPES[kind].grid, some_weight(16, 512), some_hessian(512)
    metric, feedback = damped(hessian), make_feedback(hessian, DAMP, grid, "static")

    def loss(rounded):
        error = weight - rounded.dequantized()
        return np.vdot(error @ metric, error)

    energy = hessian.diagonal()
    losses = [
        loss(round_to_nearest(weight, grid)),
        loss(round_to_nearest(weight, grid, energy)),
        loss(solve(weight, grid, feedback, replace(THOROUGH, refine=0, sweeps=0))),
        loss(solve(weight, grid, feedback, THOROUGH)),
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("kind", NEW)
def test_the_search_lowers_the_weighted_error_of_every_type(kind):
    grid, weight = TYPES[kind].grid, some_weight(8, 512)
    for importance in (np.ones(512), np.exp(np.random.default_rng(1).normal(size=512))):
        plain, searched = (
            ((weight - round_to_nearest(weight, grid, own).dequantized()) ** 2 * importance).sum()
            for own in (None, importance)
        )
        assert searched < plain * 0.98


@pytest.mark.parametrize("kind", MULTIPLES)
def test_a_searched_rounding_is_no_shorter_than_the_weight(kind):
    """Errors that shrink every layer's outputs alike would add up through a model."""
    weight, grid = np.random.default_rng(7).normal(size=(8, 512)), TYPES[kind].grid
    importance = np.exp(np.random.default_rng(1).normal(size=512))
    rounded = round_to_nearest(weight, grid, importance).dequantized()
    slopes = [
        (weight * rounded * importance)[:, own].sum(1) / (weight**2 * importance)[:, own].sum(1)
        for own in (slice(0, 256), slice(256, 512))
    ]
    np.testing.assert_allclose(slopes, 1, atol=5e-4)  # half a step of float16


@pytest.mark.parametrize("kind", MULTIPLES)
def test_the_integers_beside_are_tried(kind):
    """Of the nine (three without offsets) pairs about what fits best, the least error is taken."""
    grid, rng = TYPES[kind].grid, np.random.default_rng(2)
    group = rng.normal(size=(grid.group_size, 1))
    weights = rng.random((grid.group_size, 1)) + 0.1
    fitted = super_blocks.fit_groups(group, grid, 0, weights)
    shared = Shared(fitted.scales / 9.4, np.maximum(-fitted.offsets, 1e-3) / 9.4)
    found = super_blocks.best_multiples(group, weights, fitted, shared, grid, 0)

    def error(n, m):
        scale, offset = shared.scales[0] * n, -shared.offsets[0] * m
        decoded = [scale * nearest(x, scale, offset, grid) + offset for x in group[:, 0]]
        return (weights[:, 0] * (group[:, 0] - decoded) ** 2).sum()

    n, m = round((fitted.scales / shared.scales)[0]), round((-fitted.offsets / shared.offsets)[0])
    beside = (m - 1, m, m + 1) if grid.own_offsets else (m,)
    least = min(error(a, max(0, b)) for a in (n - 1, n, n + 1) for b in beside)
    own = error(found.scales[0] / shared.scales[0], -found.offsets[0] / shared.offsets[0])
    assert own == pytest.approx(least, rel=1e-9)


def random_sums(rng, rows, with_offsets):
    """Sums of random levels and errors, and what gives the loss after a change."""
    levels, error = rng.normal(size=(2, 12, rows))
    root = rng.normal(size=(12, 20))
    curvature = root @ root.T
    gradient, ones = curvature @ error, np.ones(12)
    vv = np.full(rows, ones @ curvature @ ones if with_offsets else 0.0)
    sums = Sums(
        uu=(levels * (curvature @ levels)).sum(0),
        uv=ones @ curvature @ levels,
        vv=vv,
        up=(levels * gradient).sum(0),
        vp=gradient.sum(0),
    )

    def loss(row, change, other):
        left = error[:, row] - change * levels[:, row] - other * ones
        return left @ curvature @ left

    return sums, loss


@pytest.mark.parametrize("kind", MULTIPLES)
def test_refitted_integers_are_the_best_about_the_best_scale(kind):
    grid, rng = TYPES[kind].grid, np.random.default_rng(3)
    low, high = grid.multiples
    sums, loss = random_sums(rng, 50, grid.own_offsets)
    shared = Shared(rng.random(50) * 0.05 + 0.01, rng.random(50) * 0.05 + 0.01)
    n = rng.integers(3, high, 50).astype(float)
    m = rng.integers(0, high, 50) * float(grid.own_offsets)
    own = Multiples(n * shared.scales, -m * shared.offsets)
    found = super_blocks.refit_multiples(own, shared, sums, grid)
    for row in range(50):
        d, e = shared.scales[row], shared.offsets[row]

        def after(a, b, row=row, d=d, e=e):
            return loss(row, d * a - own.scales[row], -e * b - own.offsets[row])

        step = sums.up[row] / sums.uu[row]
        if grid.own_offsets:
            square = [[sums.uu[row], sums.uv[row]], [sums.uv[row], sums.vv[row]]]
            step, _ = np.linalg.solve(square, [sums.up[row], sums.vp[row]])
        middle = round((own.scales[row] + step) / d)
        tried = np.clip([middle - 1, middle, middle + 1, n[row]], low, high)
        every = range(high + 1) if grid.own_offsets else (0,)
        best = min(after(a, b) for a in tried if a != 0 for b in every)
        here = after(found.scales[row] / d, -found.offsets[row] / e)
        assert here == pytest.approx(min(best, after(n[row], m[row])), rel=1e-9)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_a_refit_of_the_shared_scale_never_raises_the_loss(kind):
    grid, rng = TYPES[kind].grid, np.random.default_rng(4)
    sums, loss = random_sums(rng, 200, grid.own_offsets)
    own = Shared(rng.random(200).astype(np.float16) + 0.5, np.full(200, 0.25))
    found = super_blocks.refit_shared(own, sums, grid)
    change, other = found.scales - own.scales, found.offsets - own.offsets
    falls = [loss(i, 0, 0) - loss(i, change[i], other[i]) for i in range(200)]
    assert min(falls) >= 0
    assert max(falls) > 0
    assert (found.scales == found.scales.astype(np.float16)).all()


def test_searched_lines_are_least_squares_fits():
    """A group that lies on its codes is found exactly."""
    rng = np.random.default_rng(5)
    codes = rng.permutation(32)[None] % 16
    for offset in (-0.3, 0.0, 0.7):
        weight = 0.11 * codes + offset
        ones = np.ones_like(weight)
        scale, found = search_offsets(weight, ones, 15, -1, positive=True)
        np.testing.assert_allclose([*scale, *found], [0.11, offset], atol=1e-12)


def test_signed_scales_put_the_farthest_weight_on_the_longer_side():
    weight = np.array([[-8.0, 3.0, 1.0], [8.0, -3.0, 1.0]])
    rounded = round_to_nearest(np.tile(weight, (1, 256))[:, :512], TYPES["Q6_K"].grid)
    assert (rounded.super_scales[0] * rounded.scales[0, 0] > 0).all()
    assert (rounded.super_scales[1] * rounded.scales[1, 0] < 0).all()
    scale = search_signed(
        weight, np.ones((2, 1)), (-8.0, 7.0), -1, lambda x: np.rint(x).clip(-8, 7)
    )
    np.testing.assert_allclose(scale, [1, -1])


# ---- odd rows ----


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_odd_rows_stay_finite_and_zeros_stay_zeros(kind, dtype):
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(7, 512)).astype(dtype)
    weight[0] = 0
    weight[1] = 0.05
    weight[2] = -np.abs(weight[2])
    weight[3] = np.abs(weight[3])
    weight[4, 32:64] = 0
    weight[5, 17] = 400
    weight[6, :256] = 0
    hessian = some_hessian(512).astype(dtype)
    grid = TYPES[kind].grid
    feedback = make_feedback(hessian, DAMP, grid, "static")
    every = [
        round_to_nearest(weight, grid),
        round_to_nearest(weight, grid, np.ones(512, dtype)),
        solve(weight, grid, feedback, THOROUGH),
    ]
    for rounded in every:
        decoded = rounded.dequantized()
        assert np.isfinite(decoded).all()
        assert not decoded[0].any()
        assert not decoded[6, :256].any() or rounded is every[2]
        assert ((weight - decoded) ** 2).sum(1)[1:].max() < (weight**2).sum(1).max()


@pytest.mark.parametrize("kind", MULTIPLES)
def test_a_weight_too_large_for_float16_is_refused(kind):
    weight = np.ones((1, 256))
    weight[0, 3] = 1e9
    with pytest.raises(InputError, match="does not fit float16"):
        round_to_nearest(weight, TYPES[kind].grid)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q4_1"])
def test_it_takes_the_memory_that_is_stated(kind):
    grid, weight, hessian = TYPES[kind].grid, some_weight(512, 512), some_hessian(512)
    passes = replace(THOROUGH, sweeps=3)  # so many that their gains are measured
    tracemalloc.start()
    solve(weight, grid, make_feedback(hessian, DAMP, grid, "static"), passes)
    _, taken = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    taken -= 2 * weight.size  # the result, in codes and, at most, as much of scales
    assert taken <= METHOD.memory(weight.shape, grid, False) <= 1.5 * taken


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "Q4_1"])
def test_the_loss_that_sweeps_end_by_is_that_of_the_error(kind):
    grid, weight, hessian = TYPES[kind].grid, some_weight(4, 512), some_hessian(512)
    feedback = make_feedback(hessian, DAMP, grid, "static")
    ordered = np.ascontiguousarray(weight.T[feedback.order])
    solved = Panel(ordered, grid, feedback, replace(THOROUGH, sweeps=3), None)
    solved.run()
    quadratic = damped(hessian)[np.ix_(feedback.order, feedback.order)]
    expected = ((quadratic @ solved.error) * solved.error).sum()
    assert solved.loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "Q4_1"])
def test_results_do_not_depend_on_the_panels(kind):
    grid, weight, hessian = TYPES[kind].grid, some_weight(7, 256), some_hessian(256)
    feedback = make_feedback(hessian, DAMP, grid, "static")
    whole = solve(weight, grid, feedback, THOROUGH).dequantized()
    for rows in (1, 3, 7):
        parts = solve(weight, grid, feedback, THOROUGH, panel_rows=rows).dequantized()
        np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-9)
