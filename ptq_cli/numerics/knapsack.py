"""One choice for each of many groups, of least cost within a size: the multiple-choice knapsack.

    minimize Σ cost(g, choice of g)   with   Σ size(g, choice of g) ≤ budget

By Lagrange: where a byte has the price λ, each group takes the choice of least cost + λ · size,
which lies on the lower hull of its choices. Going down that price, all groups' steps along their
hulls in the order of what they gain a byte, gives the curve of sizes and least costs, a solution
(the last point that fits) and a bound that none goes below:

    bound = Σ min(cost + λ · size) − λ · budget.

A choice of a group that is not the one of least cost + λ · size is worse by a *regret*. Of a
solution below `bound + gap` the regrets sum to at most `gap`. So the exact pass goes through the
groups and keeps of all partial sums those whose regret is within the gap to the solution known, and
of which no other is both smaller and of less cost (Kellerer, Pferschy, Pisinger: Knapsack Problems,
chapter 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Costs = Sequence[NDArray[np.float64]]  # of each group, by choice
Sizes = Sequence[NDArray[np.int64]]

MOST_SUMS = 1 << 13  # partial sums kept at a time; with more of them the least regrets are


@dataclass(frozen=True)
class Step:
    """From one choice of a group to the next on its hull. slope: cost a byte, below zero"""

    slope: float
    group: int
    before: int
    after: int


def steps(costs: Costs, sizes: Sizes) -> tuple[list[int], list[Step]]:
    """Each group's smallest choice on its hull, and the steps from there, those that gain most a
    byte first."""
    first, found = [], []
    for group, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        hull = lower_hull(cost, size)
        first.append(hull[0])
        for before, after in pairwise(hull):
            slope = (cost[after] - cost[before]) / (size[after] - size[before])
            found.append(Step(float(slope), group, before, after))
    return first, sorted(found, key=lambda step: (step.slope, step.group))


def lower_hull(cost: NDArray[np.float64], size: NDArray[np.int64]) -> list[int]:
    """Choices on the lower hull, by rising size and falling cost; those of infinite cost aside."""
    possible = [k for k in np.lexsort((cost, size)) if np.isfinite(cost[k])]
    hull: list[int] = []
    for k in map(int, possible):
        if hull and cost[k] >= cost[hull[-1]]:
            continue
        while hull and size[k] == size[hull[-1]]:
            hull.pop()
        while len(hull) > 1 and _above(hull[-2], hull[-1], k, cost, size):
            hull.pop()
        hull.append(k)
    return hull


def _above(a: int, b: int, c: int, cost: NDArray[np.float64], size: NDArray[np.int64]) -> bool:
    """Whether b does not lie below the line from a to c."""
    return bool(
        (cost[b] - cost[a]) * (size[c] - size[a]) >= (cost[c] - cost[a]) * (size[b] - size[a])
    )


def curve(costs: Costs, sizes: Sizes) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sizes and the least costs of the points that some price a byte gives, by rising size."""
    first, later = steps(costs, sizes)
    size = [sum(int(own[k]) for own, k in zip(sizes, first, strict=True))]
    cost = [sum(float(own[k]) for own, k in zip(costs, first, strict=True))]
    for step in later:
        own, before, after = step.group, step.before, step.after
        size.append(size[-1] + int(sizes[own][after] - sizes[own][before]))
        cost.append(cost[-1] + float(costs[own][after] - costs[own][before]))
    return np.array(size), np.array(cost)


def allocate(costs: Costs, sizes: Sizes, budget: int) -> list[int]:
    """The choice of each group.

    costs, sizes: by group, [choices]; an infinite cost is no choice
    budget: that the sizes may sum to

    Raises:
        ValueError: not even the smallest choices fit.
    """
    picks, price = _on_the_curve(costs, sizes, budget)
    least = [cost + price * size for cost, size in zip(costs, sizes, strict=True)]
    regrets = [own - own.min() for own in least]
    bound = sum(float(own.min()) for own in least) - price * budget
    known = sum(float(own[k]) for own, k in zip(costs, picks, strict=True))
    return _exact(costs, sizes, regrets, budget, known - bound) or picks


def _on_the_curve(costs: Costs, sizes: Sizes, budget: int) -> tuple[list[int], float]:
    """The last point of the curve that fits, then whatever further steps still fit; and the price
    of a byte there."""
    picks, later = steps(costs, sizes)
    room = budget - sum(int(own[k]) for own, k in zip(sizes, picks, strict=True))
    if room < 0:
        raise ValueError(f"the smallest choices take {-room} more than {budget}")
    price: float | None = None
    for step in later:
        more = int(sizes[step.group][step.after] - sizes[step.group][step.before])
        if picks[step.group] == step.before and more <= room:
            picks[step.group], room = step.after, room - more
        elif price is None:
            price = -step.slope
    return picks, price or 0.0


def _exact(costs: Costs, sizes: Sizes, regrets: Costs, budget: int, gap: float) -> list[int] | None:
    """The solution of least cost of all whose regrets sum to at most `gap`; None where there is
    none that is found."""
    smallest = [int(own[np.isfinite(cost)].min()) for cost, own in zip(costs, sizes, strict=True)]
    rest = [*np.cumsum(smallest[::-1])[::-1].tolist(), 0]
    size, cost, regret = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    slack = gap * (1 + 1e-9) + 1e-15
    for group, own in enumerate(zip(costs, sizes, regrets, strict=True)):
        sums = [np.add.outer(x, y).ravel() for x, y in zip((cost, size, regret), own, strict=True)]
        fits = np.flatnonzero((sums[2] <= slack) & (sums[1] + rest[group + 1] <= budget))
        kept = fits[_undominated(*(x[fits] for x in sums))]
        if not len(kept):
            return None
        cost, size, regret = (x[kept] for x in sums)
        trail.append(np.divmod(kept, len(own[0])))
    at = int(cost.argmin())
    picks = []
    for parents, choices in reversed(trail):
        picks.append(int(choices[at]))
        at = int(parents[at])
    return picks[::-1]


def _undominated(
    cost: NDArray[np.float64], size: NDArray[np.int64], regret: NDArray[np.float64]
) -> NDArray[np.intp]:
    """Sums of which no other is both smaller and of less cost, by rising size."""
    order = np.lexsort((cost, size))
    before = np.concatenate([[np.inf], np.minimum.accumulate(cost[order])[:-1]])
    kept = order[cost[order] < before]
    if len(kept) > MOST_SUMS:
        kept = np.sort(kept[np.argsort(regret[kept], kind="stable")[:MOST_SUMS]])
    return kept
