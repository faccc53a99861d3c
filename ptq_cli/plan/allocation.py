"""A budget, and what each group gets of it.

The cost of a group at a choice is the KL divergence of the predictions that its rounding alone
would cause. It was tried at one or two choices; elsewhere it follows from the error: in proportion
below the trials, and between them, and above, as the power of the error that goes through both.
Costs of groups add up: errors of different places are nearly independent of one another. Where the
model cannot be run, the cost is the sum of the layers' relative errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose, log
from typing import Any

import numpy as np

from ptq_cli.core.text import size
from ptq_cli.errors import InputError
from ptq_cli.numerics.knapsack import allocate, curve
from ptq_cli.plan.choices import Choice, Group
from ptq_cli.plan.prediction import rounded, thinned

Point = tuple[float, int, float]  # bits a weight, bytes of all weights, cost

LINEAR = 1.5  # a group's KL an error may differ so much between its trials and be called linear


@dataclass(frozen=True)
class Budget:
    """What is asked for: bits a weight of what is rounded, scales included, or bytes of weights.

    choices, keep: as `read_choices` and `kept_rules` take them
    fast: errors of rounding to nearest in searched ranges, whatever the method
    trial_tokens: that the choices' effect on the predictions is tried on
    """

    bits_per_weight: float | None = None
    size: int | None = None
    choices: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    fast: bool = False
    trial_tokens: int = 1024


@dataclass(frozen=True)
class Trial:
    """What a group's rounding did to the predictions: its relative error there, and the KL."""

    error: float
    divergence: float


def divergence_of(error: float, trials: Sequence[Trial]) -> float:
    """The KL divergence that a group with this error would cause."""
    known = sorted((x for x in trials if x.error > 0 and x.divergence > 0), key=lambda x: x.error)
    if not known or error <= 0:
        return 0.0
    low, high = known[0], known[-1]
    if error <= low.error or isclose(low.error, high.error):
        return low.divergence * error / low.error
    power = log(high.divergence / low.divergence) / log(high.error / low.error)
    return float(low.divergence * (error / low.error) ** max(power, 0.0))


def is_linear(trials: Sequence[Trial]) -> bool:
    """Whether the divergence of a group is in proportion to its error, as far as was tried."""
    shares = [x.divergence / x.error for x in trials if x.error > 0]
    return not shares or max(shares) <= LINEAR * max(min(shares), 1e-300)


@dataclass(frozen=True)
class Allocation:
    """What was decided.

    picks: choice of each group
    predicted: KL divergence in nats, or the sum of relative errors where `runs` is false
    size: bytes of all weights; bits_per_weight: of those that are rounded
    points: bits a weight, bytes and prediction along the curve; uniform: of each choice alone
    bent: groups whose divergence is not in proportion to their error
    """

    groups: tuple[Group, ...]
    picks: tuple[str, ...]
    predicted: float
    size: int
    bits_per_weight: float
    points: tuple[Point, ...]
    uniform: Mapping[str, Point]
    runs: bool
    bent: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """For the recipe and the report."""
        word = "kl" if self.runs else "rel_err"
        uniform = {
            name: [rounded(bits), rounded(cost)] for name, (bits, _, cost) in self.uniform.items()
        }
        return {
            f"predicted_{word}": rounded(self.predicted),
            "bits_per_weight": rounded(self.bits_per_weight),
            "bytes": self.size,
            "curve": thinned([(bits, cost) for bits, _, cost in self.points]),
            "uniform": uniform,
        }

    def as_json(self) -> dict[str, Any]:
        """The same, with the choice of each group and what the choices alone would cost."""
        chosen = {g.name: pick for g, pick in zip(self.groups, self.picks, strict=True)}
        uniform = {
            name: {"bits_per_weight": bits, "bytes": size, "cost": cost}
            for name, (bits, size, cost) in self.uniform.items()
        }
        return {**self.document(), "groups": chosen, "uniform": uniform, "bent": list(self.bent)}


def decide(
    groups: Sequence[Group],
    choices: Mapping[str, Choice],
    costs: Mapping[str, Mapping[str, float]],
    budget: Budget,
    rest: int,
) -> tuple[tuple[str, ...], tuple[Point, ...], dict[str, Point]]:
    """The choice of each group, the curve, and the uniform choices.

    costs: by group and choice; rest: bytes of the weights that no choice changes

    Raises:
        InputError: the budget is below the smallest choices, or above the largest.
    """
    names = list(choices)
    cost = [np.array([costs[g.name].get(c, np.inf) for c in names]) for g in groups]
    sizes = [np.array([g.sizes.get(c, 0) for c in names], np.int64) for g in groups]
    weights = sum(group.weights for group in groups)
    picks = allocate(cost, sizes, room(groups, budget, rest, weights))

    def point(total: int, worth: float) -> Point:
        return 8 * total / weights, rest + total, worth

    points = tuple(point(int(s), float(c)) for s, c in zip(*curve(cost, sizes), strict=True))
    uniform = {
        name: point(int(sum(s[k] for s in sizes)), float(sum(c[k] for c in cost)))
        for k, name in enumerate(names)
        if all(np.isfinite(c[k]) for c in cost)
    }
    return tuple(names[k] for k in picks), points, uniform


def room(groups: Sequence[Group], budget: Budget, rest: int, weights: int) -> int:
    """Bytes that the groups may take.

    Raises:
        InputError: less than the smallest choices take, or more than the largest.
    """
    low = sum(min(group.sizes.values()) for group in groups)
    high = sum(max(group.sizes.values()) for group in groups)
    if budget.size is not None:
        found, least, most = budget.size - rest, _said(low + rest), _said(high + rest)
        asked = f"--target-size {_said(budget.size)}"
    else:
        assert budget.bits_per_weight is not None
        found = int(budget.bits_per_weight * weights / 8)
        least, most = f"{8 * low / weights:.3f}", f"{8 * high / weights:.3f}"
        asked = f"--target-bpw {budget.bits_per_weight:g}"
    if found < low:
        raise InputError(f"{asked} is less than the smallest choices take, {least}")
    if found > high:
        raise InputError(
            f"{asked} is more than the largest choices take, {most}",
            hint="a smaller budget, or larger --choices",
        )
    return found


def _said(count: int) -> str:
    return f"{count} bytes" + (f" ({size(count)})" if count >= 1024 else "")
