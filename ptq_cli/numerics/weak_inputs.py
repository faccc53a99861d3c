"""Inputs that say little: errors measured on them are no measure of the model.

A rounding that is fitted to a few inputs, or to one input again and again, is nearly exact on those
and on nothing else, so its gain is large where the calibration is bad. What is looked at is what
every calibration keeps: the held-out inputs and the sample of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import Array

FEWEST_HELDOUT = 10
MOST = 0.5  # of the inputs that may be one and the same
REPEATED = 0.4  # of them may repeat earlier ones, as the beginning that all prompts share does

T = TypeVar("T")


def weak_inputs(statistics: SiteStatistics) -> dict[str, float]:
    """What is wrong with a site's inputs; empty where nothing is.

    heldout: how many are held out, where those are fewer than FEWEST_HELDOUT
    most_frequent: the share of the most frequent input, where it is more than MOST
    repeated: the share of inputs that are equal to an earlier one, where it is more than REPEATED
    zero: 1, where all are zero
    """
    found: dict[str, float] = {}
    if len(statistics.heldout) < FEWEST_HELDOUT:
        found["heldout"] = len(statistics.heldout)
    if not statistics.hessian.diagonal().any() and not statistics.heldout.any():
        return {**found, "zero": 1}
    n = len(statistics.heldout) + len(statistics.sample)
    if n > 1:
        times = _times(np.concatenate([statistics.heldout, statistics.sample]))
        most, repeated = times.max() / n, 1 - len(times) / n
        found |= {"most_frequent": float(most)} if most > MOST else {}
        found |= {"repeated": float(repeated)} if repeated > REPEATED else {}
    return found


def _times(rows: Array) -> NDArray[np.int64]:
    """How often each different row stands in `rows`, [n, width]."""
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows[0].nbytes)))
    times: NDArray[np.int64] = np.unique(whole, return_counts=True)[1]
    return times


def apart_from_experts(found: Mapping[str, T]) -> Mapping[str, T]:
    """What was found of all sites or layers but experts, which see few tokens of few kinds; all
    where there are only experts."""
    return {name: x for name, x in found.items() if "expert" not in name} or found


def without_natural_repeats(
    found: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """What was found of each site or layer, `repeated` only where most of them have it: equal
    tokens are equal inputs of a first layer."""
    plain = apart_from_experts(found)
    most = sum("repeated" in own for own in plain.values()) > len(plain) / 2
    return {
        name: {key: value for key, value in own.items() if most or key != "repeated"}
        for name, own in found.items()
    }
