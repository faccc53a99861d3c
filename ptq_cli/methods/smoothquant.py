"""SmoothQuant: factors that balance outlying channels of the inputs against the weights.

The mathematics and its floors stand in numerics/smoothquant.py (Xiao et al., arXiv 2211.10438).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ptq_cli.core.plugins import Smoother, SmoothingCase, SmoothingChoice
from ptq_cli.numerics.activations import SCHEMES, ActivationSettings
from ptq_cli.numerics.smoothquant import alpha_errors, smooth_factors, tied, weights_absmax


@dataclass(frozen=True)
class SmoothquantSettings:
    alpha: float | str = field(
        default=0.5,
        metadata={
            "help": "Migration strength: how much of the inputs' range moves into the weights, 0 to"
            " 1; auto: per site the one with the least output error.",
            "min": 0.0,
            "max": 1.0,
            "words": ("auto",),
            "metavar": "X|auto",
        },
    )
    activation_scheme: str = field(
        default="dynamic-token",
        metadata={
            "help": "How inputs are rounded at run time: a scale per token, per tensor, one known"
            " beforehand, or not at all.",
            "choices": SCHEMES,
        },
    )
    activation_bits: int = field(
        default=8,
        metadata={
            "help": "Bits per input.",
            "choices": (8, 4),
            "needs": ({"activation_scheme": tuple(s for s in SCHEMES if s != "none")},),
        },
    )
    then: str = field(
        default="rtn",
        metadata={"help": "What rounds the smoothed weights.", "choices": ("rtn", "gptq")},
    )


def _search(case: SmoothingCase, settings: SmoothquantSettings) -> tuple[SmoothingChoice, ...]:
    loud = tied(case.statistics.absmax, case.ties)
    heavy = tied(weights_absmax(case.weights), case.ties)
    alpha = settings.alpha if isinstance(settings.alpha, float) else _best_alpha(case, settings)
    if alpha is None:
        return ()
    return (SmoothingChoice(alpha, smooth_factors(loud, heavy, alpha)),)


def _best_alpha(case: SmoothingCase, settings: SmoothquantSettings) -> float | None:
    """The alpha with the least error on the sample, the lowest of equal ones; None where no
    smoothing at all is as good."""
    activation = case.activation
    if activation is not None and not activation.dynamic:
        # the sample's own range stands for a static one
        activation = replace(activation, dynamic=True, per_token=False)
    elif activation is not None and activation.calibrated:
        activation = replace(activation, scale_dtype="float32")  # which wants no global scale
    sample = case.statistics.sample.astype(np.float32)
    errors = alpha_errors(sample, case.weights, case.grid, activation, case.ties)
    return min(errors, key=errors.__getitem__)


def _inputs(settings: SmoothquantSettings) -> ActivationSettings | None:
    if settings.activation_scheme == "none":
        return None
    return ActivationSettings(settings.activation_bits, settings.activation_scheme, static_scale=0)


SMOOTHER = Smoother(
    name="smoothquant",
    help="SmoothQuant: outliers of the inputs are moved into the weights.",
    settings=SmoothquantSettings,
    defaults={"bits": 8, "group_size": -1, "narrow_range": True},
    method="rtn",
    search=_search,
    effort=1.2,
    inputs=_inputs,
    floats=True,
    needs_hessian=False,
)
