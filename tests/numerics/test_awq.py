"""AWQ's searches against slow twins of the authors' code."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.core.plugins import SmoothingCase
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.methods.awq import SMOOTHER, AwqSettings
from ptq_cli.numerics.awq import awq_factors, clip, hessian_root, scale_losses, search_clip
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.smoothquant import tied
from ptq_cli.numerics.statistics import SiteAccumulator

ASYM = Grid(4, 16, sym=False, scale_dtype="float32")


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def site(rng, n=80, width=48):
    spread = np.exp(rng.standard_normal(width)).astype(np.float32)
    inputs = rng.standard_normal((n, width)).astype(np.float32) * spread
    return inputs, [rng.standard_normal((rows, width)).astype(np.float32) for rows in (24, 12)]


def slow_loss(inputs, weights, grid, factors):
    total = 0.0
    for weight in weights:
        rounded = round_to_nearest(weight * factors, grid).dequantized() / factors
        error = inputs.astype(np.float64) @ (weight - rounded).astype(np.float64).T
        total += float(np.square(error).sum()) / len(inputs)
    return total


def slow_clip(inputs, weight, grid, n_grid=20, max_shrink=0.5):
    """auto_clip_layer, one group of one row at a time."""
    starts = grid.starts(weight.shape[1])
    limits = np.zeros((len(weight), len(starts) - 1))
    for i, row in enumerate(weight):
        for g in range(len(starts) - 1):
            columns = slice(starts[g], starts[g + 1])
            part, sample = row[columns], inputs[:, columns].astype(np.float64)
            outputs, least = sample @ part, np.inf
            for step in range(int(max_shrink * n_grid)):
                limit = np.abs(part).max() * np.float32(1 - step / n_grid)
                clipped = np.clip(part, -limit, limit)[None]
                whole = Grid(grid.bits, -1, grid.sym, grid.narrow_range, grid.scale_dtype)
                rounded = round_to_nearest(clipped, whole).dequantized()[0]
                error = float(np.square(sample @ rounded - outputs).mean())
                if error < least:
                    least, limits[i, g] = error, limit
    return limits


def test_factors_are_normalised_as_in_the_paper_s_code():
    absmean = np.array([0.0, 0.01, 1.0, 16.0], np.float32)
    factors = awq_factors(absmean, 0.5)
    raw = np.maximum(absmean**0.5, 1e-4)
    np.testing.assert_allclose(factors, raw / np.sqrt(raw.max() * raw.min()), rtol=1e-6)
    assert (awq_factors(absmean, 0.0) == 1).all()
    assert awq_factors(absmean[:0], 0.5).shape == (0,)
    with pytest.raises(NumericalError, match="NaN"):
        awq_factors(np.array([np.nan]), 0.5)


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("group_size", [16, 20, -1, 0])
def test_every_ratio_s_loss_equals_the_slow_twin(rng, n, group_size):
    inputs, weights = site(rng, n)
    grid = Grid(4, group_size, sym=False, scale_dtype="float32")
    absmean = np.abs(inputs).mean(0)
    losses = scale_losses(inputs, weights, grid, absmean, n_grid=5)
    assert list(losses) == [0, 0.2, 0.4, 0.6, 0.8]
    expected = [slow_loss(inputs, weights, grid, awq_factors(absmean, r)) for r in losses]
    np.testing.assert_allclose(list(losses.values()), expected, rtol=1e-4)


def test_scaling_spares_loud_channels(rng):
    inputs, weights = site(rng)
    inputs[:, 5] *= 40
    losses = scale_losses(inputs, weights, ASYM, np.abs(inputs).mean(0))
    assert len(losses) == 20
    assert min(losses.values()) < 0.5 * losses[0]


def test_the_search_gives_the_ratios_that_lose_less_than_none_the_best_first(rng):
    inputs, weights = site(rng)
    inputs[:, 5] *= 40
    sums = SiteAccumulator(48, heldout_every=0)
    sums.update(inputs)
    statistics = sums.result("site", ("a", "b"))
    case = SmoothingCase(tuple(weights), statistics, np.tile(np.arange(24), 2), ASYM)
    found = SMOOTHER.search(case, AwqSettings(n_grid=10))
    absmean = tied(statistics.absmean, case.ties, "mean")
    losses = scale_losses(hessian_root(statistics.hessian), weights, ASYM, absmean, 10)
    better = [ratio for ratio, loss in losses.items() if loss < losses[0]]
    assert [choice.strength for choice in found] == sorted(better, key=losses.__getitem__)
    for choice in found:
        np.testing.assert_array_equal(choice.factors, awq_factors(absmean, choice.strength))
        np.testing.assert_array_equal(choice.factors[:24], choice.factors[24:])


@pytest.mark.parametrize("n", [10, 90])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, 16, sym=False, scale_dtype="float32"),
        Grid(3, 20, sym=True, scale_dtype="float32"),
        Grid(4, -1, sym=True, narrow_range=True, scale_dtype="float32"),
    ],
    ids=str,
)
def test_clipping_equals_the_slow_twin(rng, grid, n):
    inputs, weights = site(rng, n)
    limits = search_clip(inputs, weights[0], grid)
    np.testing.assert_allclose(limits, slow_clip(inputs, weights[0], grid), rtol=1e-6)


def test_clipping_never_loses_against_rounding_group_by_group(rng):
    inputs, weights = site(rng)
    weight = weights[0] ** 3
    limits = search_clip(inputs, weight, ASYM)
    clipped = round_to_nearest(clip(weight, limits, ASYM), ASYM).dequantized()
    plain = round_to_nearest(weight, ASYM).dequantized()
    for start, stop in ((0, 16), (16, 32), (32, 48)):
        part = inputs[:, start:stop]
        with_clip = np.square(part @ (weight - clipped)[:, start:stop].T).sum(0)
        without = np.square(part @ (weight - plain)[:, start:stop].T).sum(0)
        assert (with_clip <= without * (1 + 1e-4)).all()
    assert (limits < np.abs(weight.reshape(24, 3, 16)).max(2)).any()


def test_all_zero_groups_are_left(rng):
    inputs, weights = site(rng)
    weights[0][3] = 0
    limits = search_clip(inputs, weights[0], ASYM)
    assert (limits[3] == 0).all()
    assert not clip(weights[0], limits, ASYM)[3].any()


def test_the_hessian_s_root_stands_for_the_inputs(rng):
    inputs, weights = site(rng, 300)
    hessian = inputs.T @ inputs / len(inputs)
    root = hessian_root(hessian, damp=1e-6)
    np.testing.assert_allclose(root.T @ root / len(root), hessian, rtol=1e-3, atol=1e-3)
    absmean = np.abs(inputs).mean(0)
    found = scale_losses(root, weights, ASYM, absmean, n_grid=4)
    direct = scale_losses(inputs, weights, ASYM, absmean, n_grid=4)
    np.testing.assert_allclose(list(found.values()), list(direct.values()), rtol=1e-3)
    with pytest.raises(NumericalError, match="positive definite"):
        hessian_root(-np.eye(3, dtype=np.float32))


def test_what_makes_no_sense_is_an_error(rng):
    inputs, weights = site(rng)
    with pytest.raises(InputError, match="per tensor"):
        search_clip(inputs, weights[0], Grid(4, 0))
    huge = [weight * np.float32(1e7) for weight in weights]
    with pytest.raises(NumericalError, match="no ratio"):
        scale_losses(inputs, huge, Grid(4, 16), np.abs(inputs).mean(0))
