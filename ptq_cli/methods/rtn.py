"""Round to nearest: each weight goes to the nearest point of its group's grid.

With `mse`, the range of each group is shrunk to where the weighted squared rounding error is least;
the weight of a column is its mean squared input, 1 where there is no calibration; or each weight
has its own, its Fisher information.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.plugins import Method, MethodResult
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import FloatArray
from ptq_cli.numerics.parallel import PIECE_ELEMENTS
from ptq_cli.numerics.rounding import round_to_nearest


@dataclass(frozen=True)
class RtnSettings:
    mse: bool = field(
        default=True,
        metadata={"help": "Search the range of each group for the least rounding error."},
    )
    weight: str = field(
        default="hessian",
        metadata={
            "help": "What weighs rounding errors in the scale search: the inputs' energy, or the"
            " diagonal Fisher information (ptq calibrate --gradients).",
            "choices": ("hessian", "fisher"),
            "needs": ({"mse": (True,)}, {"calibration": (True,)}),
        },
    )


def _prepare(statistics: SiteStatistics | None, grid: Grid, settings: RtnSettings) -> Any:
    return None if statistics is None else statistics.hessian.diagonal()


def _apply(
    weight: FloatArray,
    diagonal: Any,
    grid: Grid,
    settings: RtnSettings,
    importance: FloatArray | None = None,
) -> MethodResult:
    if not settings.mse:
        return MethodResult(round_to_nearest(weight, grid))
    if importance is None:
        importance = np.ones(weight.shape[1]) if diagonal is None else diagonal
    return MethodResult(round_to_nearest(weight, grid, importance.astype(weight.dtype)))


def _memory(shape: tuple[int, int], grid: Grid, drift: bool) -> int:
    size = shape[0] * shape[1]
    return 18 * size if not grid.by_rows else size + 48 * PIECE_ELEMENTS


METHOD = Method(
    name="rtn",
    help="Round to nearest, with a search for the best range of each group.",
    settings=RtnSettings,
    prepare=_prepare,
    apply=_apply,
    needs_hessian=False,
    memory=_memory,
    effort=0.5,
    is_nearest=lambda settings: not settings.mse,
    searches_ranges=True,
    needs_fisher=lambda settings: settings.weight == "fisher",
)
