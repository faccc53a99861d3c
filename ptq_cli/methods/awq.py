"""AWQ: factors that protect the weights of large inputs, then a range of each group cut to the
outputs' error.

The mathematics stands in numerics/awq.py (Lin et al., arXiv 2306.00978). Two records: `SMOOTHER`
finds the factors, `METHOD` rounds what they have scaled.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.plugins import (
    Method,
    MethodResult,
    Smoother,
    SmoothingCase,
    SmoothingChoice,
)
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.numerics.awq import awq_factors, clip, hessian_root, scale_losses, search_clip
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.smoothquant import tied


@dataclass(frozen=True)
class AwqSettings:
    n_grid: int = field(
        default=20, metadata={"help": "Steps of the scale search.", "min": 1, "max": 1000}
    )
    clip: bool = field(
        default=True,
        metadata={
            "help": "Search the range of each group for the least error of the outputs.",
            "needs": ({"then": ("awq",), "compare": (True,)},),
        },
    )
    then: str = field(
        default="awq",
        metadata={
            "help": "What rounds the scaled weights: the clip search, or GPTQ.",
            "choices": ("awq", "gptq"),
        },
    )
    compare: bool = field(
        default=True,
        metadata={"help": "Try rtn, awq, gptq and awq+gptq on every layer and report the best."},
    )


def _search(case: SmoothingCase, settings: AwqSettings) -> tuple[SmoothingChoice, ...]:
    """Ratios that lose less than none, the best first."""
    absmean = tied(case.statistics.absmean, case.ties, "mean")
    if not absmean.any():
        return ()
    root = hessian_root(case.statistics.hessian)
    losses = scale_losses(root, case.weights, case.grid, absmean, settings.n_grid)
    better = sorted((loss, ratio) for ratio, loss in losses.items() if loss < losses[0.0])
    return tuple(SmoothingChoice(ratio, awq_factors(absmean, ratio)) for _, ratio in better)


def _prepare(
    statistics: SiteStatistics | None, grid: Grid, settings: AwqSettings
) -> FloatArray | None:
    if statistics is None or not settings.clip or not statistics.absmean.any():
        return None
    return hessian_root(statistics.hessian)


def _apply(
    weight: FloatArray,
    root: FloatArray | None,
    grid: Grid,
    settings: AwqSettings,
    importance: FloatArray | None = None,
) -> MethodResult:
    """Round to nearest, each group within the range that the clip search gives it."""
    if root is None:
        return MethodResult(round_to_nearest(weight, grid, np.ones(weight.shape[1], weight.dtype)))
    # their range is searched from both ends, or over scales that are no integers' (IQ4_NL's have a
    # sign), for less error than a cut leaves
    if grid.own_offsets or grid.multiples or not grid.integers:
        energy = (root * root).sum(0).astype(weight.dtype)
        return MethodResult(round_to_nearest(weight, grid, energy))
    limits = search_clip(root, weight.astype(np.float32), grid, settings.n_grid)
    return MethodResult(round_to_nearest(clip(weight, limits, grid), grid))


def _check(settings: AwqSettings, group_sizes: Collection[int]) -> None:
    if settings.clip and (settings.then == "awq" or settings.compare) and 0 in group_sizes:
        raise InputError(
            "the clip search cuts the range of a group or row; group_size 0 has one for the tensor",
            hint="--no-clip, or --group-size -1",
        )


def _memory(shape: tuple[int, int], grid: Grid, drift: bool) -> int:
    out_features, n = shape
    return 4 * (4 * n * n + 5 * out_features * n)


METHOD = Method(
    name="awq",
    help="Round to nearest, each group's range cut to the least error of the outputs.",
    settings=AwqSettings,
    prepare=_prepare,
    apply=_apply,
    needs_hessian=True,
    memory=_memory,
    effort=0.7,
)

SMOOTHER = Smoother(
    name="awq",
    help="AWQ: channels with large inputs are scaled up before their weights are rounded.",
    settings=AwqSettings,
    defaults={},
    method="awq",
    search=_search,
    effort=8.0,
    check=_check,
    compares=lambda settings: settings.compare,
)
