"""The multiple-choice knapsack against every combination, and at the size of large models."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ptq_cli.numerics.knapsack import allocate, curve, lower_hull


def cost_of(picks, values):
    return sum(float(own[k]) for own, k in zip(values, picks, strict=True))


def by_brute_force(costs, sizes, budget):
    """The least cost of all combinations that fit; None where none does."""
    every = product(*(range(len(own)) for own in costs))
    fitting = [cost_of(picks, costs) for picks in every if cost_of(picks, sizes) <= budget]
    return min((cost for cost in fitting if np.isfinite(cost)), default=None)


def random_case(random, n_groups, n_choices, *, decimals=None, missing=0.0, sizes=40):
    """Costs that fall with the size, more or less; some choices are none."""
    costs, weights = [], []
    for _ in range(n_groups):
        size = np.sort(random.integers(1, sizes, n_choices))
        cost = np.sort(random.exponential(1.0, n_choices))[::-1] * random.exponential(1.0)
        cost = random.permutation(cost) if random.random() < 0.2 else cost
        if decimals is not None:
            cost = np.round(cost, decimals)
        gone = random.random(n_choices) < missing
        gone[random.integers(n_choices)] = False
        costs.append(np.where(gone, np.inf, cost))
        weights.append(np.where(gone, 0, size))
    return costs, weights


CASES = {
    "plain": {},
    "equal costs": {"decimals": 1},
    "equal sizes": {"sizes": 3},
    "choices that are none": {"missing": 0.4},
    "all at once": {"decimals": 1, "missing": 0.3, "sizes": 4},
}


@pytest.mark.parametrize("kind", CASES)
def test_it_is_the_best_of_all_combinations(kind):
    random = np.random.default_rng([*kind.encode()])
    for _ in range(60):
        n_groups, n_choices = random.integers(1, 6), random.integers(1, 5)
        costs, sizes = random_case(random, n_groups, n_choices, **CASES[kind])
        budget = int(random.integers(0, 40 * n_groups))
        wanted = by_brute_force(costs, sizes, budget)
        if wanted is None:
            with pytest.raises(ValueError, match="the smallest choices take"):
                allocate(costs, sizes, budget)
            continue
        picks = allocate(costs, sizes, budget)
        assert cost_of(picks, sizes) <= budget
        assert cost_of(picks, costs) == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        assert allocate(costs, sizes, budget) == picks


def test_a_budget_for_everything_takes_the_least_costs():
    costs = [np.array([3.0, 1.0, 1.0]), np.array([np.inf, 2.0, 4.0])]
    sizes = [np.array([1, 2, 9]), np.array([0, 5, 3])]
    assert allocate(costs, sizes, 100) == [1, 1]
    assert allocate(costs, sizes, 5) == [1, 2]
    assert allocate(costs, sizes, 4) == [0, 2]


def test_scale_of_costs_and_sizes_changes_nothing():
    costs, sizes = random_case(np.random.default_rng(3), 30, 5)
    picks = allocate(costs, sizes, 500)
    tiny, large = [c * 2.0**-70 for c in costs], [c * 2.0**40 for c in costs]
    assert allocate(tiny, sizes, 500) == picks
    assert allocate(large, sizes, 500) == picks
    assert allocate(costs, [s << 28 for s in sizes], 500 << 28) == picks


def test_the_hull_holds_what_some_price_a_byte_chooses():
    random = np.random.default_rng(5)
    for _ in range(50):
        (cost,), (size,) = random_case(random, 1, 6, missing=0.2)
        hull = lower_hull(cost, size)
        prices = np.concatenate([[0.0, 1e-9, 1e9], random.exponential(1.0, 200)])
        chosen = {min(cost + price * size) for price in prices}
        assert chosen == {min(cost[hull] + price * size[hull]) for price in prices}
        assert sorted(size[hull]) == list(size[hull])
        assert all(np.diff(cost[hull]) < 0)


def test_the_curve_falls_and_bends_upwards():
    costs, sizes = random_case(np.random.default_rng(6), 40, 5)
    size, cost = curve(costs, sizes)
    assert all(np.diff(size) > 0)
    slopes = np.diff(cost) / np.diff(size)
    assert all(slopes < 0)
    assert all(np.diff(slopes) > -1e-12)
    for budget in size[:: len(size) // 5]:
        found = cost_of(allocate(costs, sizes, int(budget)), costs)
        assert found == pytest.approx(cost[size.tolist().index(budget)])


def test_no_solution_is_better_than_the_curve_between_its_points():
    costs, sizes = random_case(np.random.default_rng(8), 25, 4)
    size, cost = curve(costs, sizes)
    for budget in range(int(size[0]), int(size[-1]), 37):
        found = cost_of(allocate(costs, sizes, budget), costs)
        assert found >= np.interp(budget, size, cost) - 1e-9
        assert found <= cost[np.searchsorted(size, budget, "right") - 1] + 1e-12


@pytest.mark.slow(1)
def test_thousands_of_groups_of_sizes_of_their_own_come_near_the_curve():
    random = np.random.default_rng(9)
    sizes = [np.sort(random.integers(1, 1 << 28, 7)) for _ in range(4000)]
    costs = [random.exponential(1.0) * np.exp(-own / (1 << 26)) for own in sizes]
    budget = sum(int(own.mean()) for own in sizes)
    picks = allocate(costs, sizes, budget)
    used = cost_of(picks, sizes)
    assert budget * 0.9999 < used <= budget
    size, cost = curve(costs, sizes)
    assert cost_of(picks, costs) <= np.interp(budget, size, cost) * 1.0001
