"""GPTQ with scale search, refinement inside the group and sweeps over the row.

The mathematics stands in numerics/gptq.py. `--refine 0 --sweeps 0 --no-mse --act-order none
--damp-percent 0.01` is the paper's algorithm (Frantar et al., arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptq_cli.core.grid import SUPER_BLOCK, Grid
from ptq_cli.core.plugins import Method, MethodResult
from ptq_cli.core.statistics import Coupling, Drift, SiteStatistics
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import NumericalError
from ptq_cli.numerics.coupling import solve_coupled
from ptq_cli.numerics.drift import correction, proven_strength, solved_drift
from ptq_cli.numerics.feedback import Feedback, make_feedback
from ptq_cli.numerics.gptq import PANEL_ROWS, solve
from ptq_cli.numerics.ldl import NotPositiveDefinite
from ptq_cli.numerics.panel import Passes
from ptq_cli.numerics.rounding import round_to_nearest

# Up to this width the arithmetic is float64: it costs little there, and codes do not depend on the
# last bit of a float32.
FLOAT64_COLUMNS = 512

DAMP_LADDER = (0.1, 1.0)

UNSET = -1


# At most so many sweeps; what they cost and gain stands in docs/measurements.md.
EFFORTS = {"fast": 0, "default": 2, "best": 10}


@dataclass(frozen=True)
class GptqSettings:
    effort: str = field(
        default="default",
        metadata={
            "help": "How long to try, where --sweeps is not given: fast rounds in half the time of"
            " default; best sweeps until little is gained.",
            "choices": tuple(EFFORTS),
            "needs": ({"calibration": (True,)},),
        },
    )
    mse: bool = field(
        default=True,
        metadata={"help": "Search the range of each group for the least weighted rounding error."},
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
    act_order: str = field(
        default="static",
        metadata={
            "help": "Order in which columns are rounded: as they stand (none); by falling"
            " activation energy inside groups that stay where they are (static); the same over"
            " the whole row (desc, writes g_idx).",
            "choices": ("none", "static", "desc"),
            "needs": ({"calibration": (True,)},),
        },
    )
    damp_percent: float = field(
        default=UNSET,
        metadata={
            "help": "Fraction of the mean Hessian diagonal added to it.",
            "min": 0.0,
            "max": 10.0,
            "shown": "0.05; the paper's 0.01 with --refine 0 --sweeps 0",
            "needs": ({"calibration": (True,)},),
        },
    )
    refine: int = field(
        default=2,
        metadata={
            "help": "Passes of coordinate descent inside each group, once it is rounded.",
            "needs": ({"calibration": (True,)},),
            "min": 0,
            "max": 100,
        },
    )
    drift: float | str = field(
        default="auto",
        metadata={
            "help": "With --tokens: how much of the error that the rounded layers before a layer"
            " leave is made up for, 0 to 1; auto: as much as held-out tokens bear out.",
            "metavar": "X|auto",
            "needs": ({"in_sequence": (True,)},),
            "words": ("auto",),
            "min": 0.0,
            "max": 1.0,
        },
    )
    head_fisher: bool = field(
        default=True,
        metadata={
            "help": "With --tokens: let the rows of layers that add to the residual stream make up"
            " for one another, by what the predictions make of the stream.",
            "needs": ({"in_sequence": (True,)},),
        },
    )
    sweeps: int = field(
        default=UNSET,
        metadata={
            "shown": "{default}; fast {fast}, best {best}".format(**EFFORTS),
            "help": "Sweeps of coordinate descent over the whole row at the end, at most: from the"
            " second on, one that lowers the loss by less than 0.2 % is the last.",
            "needs": ({"calibration": (True,)},),
            "min": 0,
            "max": 100,
        },
    )

    def __post_init__(self) -> None:
        """Sweeps that are not stated are those of the effort. Without a damping of its own: what
        measured best on held-out inputs with refinement, and the paper's where nothing is added to
        the paper's algorithm."""
        if self.sweeps == UNSET:
            object.__setattr__(self, "sweeps", EFFORTS[self.effort])
        if self.damp_percent == UNSET:
            plain = self.refine == 0 and self.sweeps == 0
            object.__setattr__(self, "damp_percent", 0.01 if plain else 0.05)


@dataclass(frozen=True)
class _Prepared:
    feedback: Feedback
    damp_percent: float
    notes: tuple[str, ...]
    drift: tuple[Drift, FloatArray] | None  # and what `solved_drift` makes of it
    heldout: Array
    coupling: Coupling | None


def _prepare(
    statistics: SiteStatistics | None, grid: Grid, settings: GptqSettings
) -> _Prepared | None:
    """Factor the site's Hessian, with more damping where it fails, each try recorded."""
    if statistics is None or not statistics.hessian.diagonal().any():
        return None
    wide = statistics.in_features > FLOAT64_COLUMNS
    hessian: FloatArray = statistics.hessian.astype(np.float32 if wide else np.float64, copy=False)
    if settings.damp_percent == 0:
        hessian = hessian.copy()
        dead = np.flatnonzero(hessian.diagonal() == 0)
        hessian[dead, dead] = hessian.diagonal().mean()
    drift = statistics.drift if settings.drift else None
    tried: list[float] = []
    for damp in (settings.damp_percent, *(d for d in DAMP_LADDER if d > settings.damp_percent)):
        try:
            feedback = make_feedback(hessian, damp, grid, settings.act_order, settings.refine > 0)
        except NotPositiveDefinite:
            tried.append(damp)
            continue
        notes = (f"damp_percent raised from {tried[0]:g} to {damp:g}",) if tried else ()
        solved = None if drift is None else (drift, solved_drift(drift, feedback))
        return _Prepared(feedback, damp, notes, solved, statistics.heldout, statistics.coupling)
    raise NumericalError(
        f"{statistics.site}: its Hessian ({statistics.in_features} columns) is not positive"
        f" definite with damp_percent {', '.join(f'{d:g}' for d in tried)}",
        hint="calibrate on more tokens, or raise --damp-percent",
    )


def _apply(
    weight: FloatArray,
    prepared: _Prepared | None,
    grid: Grid,
    settings: GptqSettings,
    importance: FloatArray | None = None,
) -> MethodResult:
    if prepared is None:
        if importance is None:
            importance = np.ones(weight.shape[1], weight.dtype)
        return MethodResult(round_to_nearest(weight, grid, importance if settings.mse else None))
    passes = Passes(settings.mse, settings.refine, settings.sweeps)
    weight = weight.astype(prepared.feedback.hessian.dtype, copy=False)
    strength = None
    if prepared.drift is not None:
        weight, strength = _corrected(weight, *prepared.drift, prepared.heldout, settings)
    if prepared.coupling is None or not grid.by_rows:
        rounded = solve(weight, grid, prepared.feedback, passes, importance)
    else:
        rounded = solve_coupled(
            weight, grid, prepared.feedback, passes, prepared.coupling, importance
        )
    return MethodResult(rounded, prepared.damp_percent, prepared.notes, strength)


def _corrected(
    weight: FloatArray, drift: Drift, solved: FloatArray, heldout: Array, settings: GptqSettings
) -> tuple[FloatArray, float]:
    """The weight that makes up for the drift, and how much of its change is taken."""
    change = correction(weight, drift, solved)
    if isinstance(settings.drift, str):
        strength = proven_strength(weight, change, drift, heldout)
    else:
        strength = settings.drift
    change *= change.dtype.type(strength)
    change += weight
    return change, strength


def _memory(shape: tuple[int, int], grid: Grid, drift: bool) -> int:
    out_features, n = shape
    item = 8 if n <= FLOAT64_COLUMNS else 4
    rows, width = min(out_features, PANEL_ROWS), SUPER_BLOCK if grid.multiples else grid.width(n)
    site = n * n + 2 * n * width  # the factor; the product and the inverse of each group
    # three of the nine are those of the search, which one grid for all rows has before
    group = width * ((9 if grid.by_rows else 6) * rows + 3 * width + n)
    # the drift, solved; the change; errors of coupled rows
    corrected = n * n + 2 * out_features * n if drift else 0
    return item * (site + 3 * n * rows + group + corrected)


METHOD = Method(
    name="gptq",
    help="GPTQ: round column by column, each error compensated by the columns after it.",
    settings=GptqSettings,
    prepare=_prepare,
    apply=_apply,
    needs_hessian=True,
    memory=_memory,
    effort=4.0,
    needs_fisher=lambda settings: settings.weight == "fisher",
    reorders=lambda settings: settings.act_order == "desc",
    corrects_drift=lambda settings: settings.drift != 0,
    couples_rows=lambda settings: settings.head_fisher and settings.drift != 0,
)
