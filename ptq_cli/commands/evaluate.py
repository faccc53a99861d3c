"""`eval` as a command runs it: what is measured against what, the job, the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_cli.calibration.find import AnyPath, SourceSettings, find_source
from ptq_cli.calibration.from_tokens import check_head, token_source
from ptq_cli.calibration.source import HELDOUT
from ptq_cli.commands.estimate import Estimate, estimate_evaluation
from ptq_cli.commands.job import origin_note
from ptq_cli.core.names import fold_names
from ptq_cli.core.progress import Listener
from ptq_cli.core.report import RunReport
from ptq_cli.errors import InputError
from ptq_cli.evaluation.errors import evaluate as run_evaluation
from ptq_cli.evaluation.sides import Sides, open_sides
from ptq_cli.numerics.activations import ActivationSettings
from ptq_cli.storage.quantized import open_quantized
from ptq_cli.storage.reports import settings_of
from ptq_cli.storage.sources import open_float
from ptq_cli.storage.tokens import Tokens, TokenSettings, read_tokens


@dataclass(frozen=True)
class EvalJob:
    """A comparison that is ready to run.

    tokens: run the models on these too, or None
    allocation: what the run that made the output was told of its mix of widths (plan/prediction.py)
    """

    sides: Sides
    tokens: Tokens | None
    per_block: bool
    allocation: Mapping[str, Any]

    def run(self, listen: Listener) -> RunReport:
        """Measure. Raises PtqError."""
        report = run_evaluation(self.sides, listen)
        settings = dict(report.settings)
        if self.allocation:
            settings["allocation"] = self.allocation
        warnings = (*report.warnings, *self.notes)
        report = dataclasses.replace(report, settings=settings, warnings=warnings)
        if self.tokens is None:
            return report
        from ptq_cli.evaluation.perplexity import measure_quality

        original, quantized = self.sides.original, self.sides.quantized
        quality = measure_quality(
            original, quantized, self.tokens, per_block=self.per_block, listen=listen
        )
        warnings = tuple(dict.fromkeys((*report.warnings, *self.tokens.warnings)))
        return dataclasses.replace(report, quality=quality, warnings=warnings)

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings that are no mistakes."""
        return origin_note(self.sides.original)

    def estimate(self) -> Estimate:
        """What `run` would do. Raises InputError: a model without a forward."""
        return estimate_evaluation(self.sides, self.tokens, self.per_block)


def prepare_evaluation(
    original: AnyPath,
    quantized: AnyPath,
    source: SourceSettings,
    *,
    per_block: bool = False,
    scheme: str | None = None,
    bits: int | None = None,
    percentile: float | None = None,
) -> EvalJob:
    """Open both sides; see `api.evaluate`. Tokens measure predictions, and the errors of layers
    where there are no other statistics of their inputs."""
    activation = _rounded_inputs(scheme, bits, percentile)
    checkpoint = open_float(Path(original), any_architecture=not source.tokens.given)
    folder = open_quantized(Path(quantized), checkpoint.config)
    statistics = find_source(checkpoint, dataclasses.replace(source, tokens=TokenSettings()))
    least = source.min_expert_tokens
    if statistics is not None and least is not None:
        raise InputError(
            f"--min-expert-tokens {least} does nothing here",
            hint=f"errors are measured with the statistics of {statistics.name}",
        )
    tokens = read_tokens(source.tokens, checkpoint) if source.tokens.given else None
    if tokens is not None:
        check_head(checkpoint)
    if statistics is None and tokens is not None:
        statistics = token_source(checkpoint, tokens, HELDOUT, min_expert_tokens=least)
    if activation is not None and statistics is None:
        raise InputError(
            f"--activation-scheme {activation.scheme} does nothing here",
            hint="it needs --tokens, --calibration or --activations",
        )
    floats = [x.module for x in folder.layers.values() if not x.grid.integers]
    if activation is not None and floats:
        raise InputError(
            f"--activation-scheme {activation.scheme} rounds inputs to integers, and the codes of"
            f" {len(floats)} layers are small floats: {fold_names(floats)}",
            hint="leave it out: inputs are rounded as the folder says",
        )
    sides = open_sides(checkpoint, folder, statistics, activation)
    allocation = settings_of(Path(quantized)).get("allocation", {})
    return EvalJob(sides, tokens, per_block, allocation)


def _rounded_inputs(
    scheme: str | None, bits: int | None, percentile: float | None
) -> ActivationSettings | None:
    """How inputs are rounded, or None where they are not. Raises InputError."""
    if scheme in (None, "none"):
        return None
    if scheme == "static" and percentile is not None:
        raise InputError(
            f"--percentile {percentile} does nothing here",
            hint="it needs --activation-scheme dynamic-token or dynamic-tensor",
        )
    part = 1.0 if percentile is None else percentile
    return ActivationSettings(8 if bits is None else bits, scheme, part, static_scale=0.0)
