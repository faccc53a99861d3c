"""How the values of a site's inputs are distributed, for who looks at a file of statistics.

Percentiles come from a histogram of |value| in bins of 1/128 octave (the upper 16 bits of the
float32 number, bfloat16's resolution): a reported percentile is within 2^−8 (0.4 %) of the exact
order statistic.
"""

from __future__ import annotations

from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.statistics import Distribution
from ptq_cli.numerics.parallel import pieces

PIECE_ELEMENTS = 1 << 18  # values whose bins are counted at a time: they stay in the cache
_BINS = 1 << 15


class DistributionSum:
    """A distribution whose values arrive in pieces."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.counts = np.zeros(_BINS, np.int64)

    def update(self, piece: NDArray[np.float32]) -> None:
        """Take in more values, [n, in_features]."""
        self.sum += float(piece.sum(dtype=np.float64))
        for rows in pieces(0, len(piece), piece.shape[1], PIECE_ELEMENTS):
            bins = np.abs(piece[rows]).view(np.uint32) >> np.uint32(16)
            self.counts += np.bincount(bins.ravel(), minlength=_BINS)

    def result(self, minimum: float, maximum: float, squares: float) -> Distribution:
        """Of all values so far. squares: their sum of squares"""
        n = int(self.counts.sum())
        filled = np.flatnonzero(self.counts)
        first, last = int(filled[0]), int(filled[-1])
        return Distribution(
            minimum=minimum,
            maximum=maximum,
            mean=self.sum / n,
            std=sqrt(max(0.0, squares / n - (self.sum / n) ** 2)),
            histogram=self.counts[first : last + 1].copy(),
            start=first,
        )


def merge_distributions(
    a: Distribution | None, b: Distribution | None, of_a: float
) -> Distribution | None:
    """That of the values of both; None where one is not known. of_a: what part of them is a's"""
    if a is None or b is None:
        return None
    mean = of_a * a.mean + (1 - of_a) * b.mean
    square = of_a * (a.std**2 + a.mean**2) + (1 - of_a) * (b.std**2 + b.mean**2)
    start = min(a.start, b.start)
    histogram = np.zeros(max(x.start + len(x.histogram) for x in (a, b)) - start, np.int64)
    for own in (a, b):
        histogram[own.start - start :][: len(own.histogram)] += own.histogram
    return Distribution(
        minimum=min(a.minimum, b.minimum),
        maximum=max(a.maximum, b.maximum),
        mean=mean,
        std=sqrt(max(0.0, square - mean * mean)),
        histogram=histogram,
        start=start,
    )


def percentile(distribution: Distribution, p: float) -> float:
    """The p-th (0 < p ≤ 1) part of |values|: the ceil(p·n)-th smallest, within 2^−8 of it."""
    total = int(distribution.histogram.sum())
    rank = max(1, ceil(p * total))
    index = int(np.searchsorted(np.cumsum(distribution.histogram), rank))
    edge = np.array([distribution.start + index], np.uint32) << np.uint32(16)
    low = float(edge.view(np.float32)[0])
    high = float((edge + np.uint32(1 << 16)).view(np.float32)[0])
    middle = 0.0 if low == 0.0 else (low + high) / 2
    return min(middle, distribution.absmax)


def static_scale(distribution: Distribution) -> float:
    """A static scale for int8 inputs: p99 / 127, or absmax / 127 where p99 is 0, or 1."""
    reach = percentile(distribution, 0.99) or distribution.absmax
    return reach / 127 if reach else 1.0
