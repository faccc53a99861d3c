"""`eval` as a command runs it: what is measured against what, the job, the report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ptq_cli.calibration.find import AnyPath, SourceSettings, find_source
from ptq_cli.commands.estimate import Estimate, estimate_evaluation
from ptq_cli.core.progress import Listener
from ptq_cli.core.report import RunReport
from ptq_cli.errors import InputError
from ptq_cli.evaluation.errors import Sides, open_sides
from ptq_cli.evaluation.errors import evaluate as run_evaluation
from ptq_cli.numerics.activations import ActivationSettings
from ptq_cli.storage.folder import open_float, open_quantized
from ptq_cli.storage.tokens import Tokens, TokenSettings, read_tokens


@dataclass(frozen=True)
class EvalJob:
    """A comparison that is ready to run. tokens: run the models on these too, or None"""

    sides: Sides
    tokens: Tokens | None
    per_block: bool

    def run(self, listen: Listener) -> RunReport:
        """Measure. Raises PtqError."""
        report = run_evaluation(self.sides, listen)
        if self.tokens is None:
            return report
        from ptq_cli.evaluation.perplexity import measure_quality

        original, quantized = self.sides.original, self.sides.quantized
        quality = measure_quality(
            original, quantized, self.tokens, per_block=self.per_block, listen=listen
        )
        warnings = (*report.warnings, *self.tokens.warnings)
        return dataclasses.replace(report, quality=quality, warnings=warnings)

    def estimate(self) -> Estimate:
        """What `run` would do. Raises InputError: a model without a forward."""
        return estimate_evaluation(self.sides, self.tokens, self.per_block)


def prepare_evaluation(
    original: AnyPath,
    quantized: AnyPath,
    source: SourceSettings,
    tokens: TokenSettings | None,
    activation: ActivationSettings | None,
    *,
    per_block: bool,
) -> EvalJob:
    """Open both sides; see `api.evaluate`."""
    checkpoint = open_float(Path(original))
    folder = open_quantized(Path(quantized))
    statistics = find_source(checkpoint, source)
    if activation is not None and statistics is None:
        raise InputError(
            f"--activation-scheme {activation.scheme} does nothing here",
            hint="it needs --calibration or --activations",
        )
    sides = open_sides(checkpoint, folder, statistics, activation)
    read = read_tokens(tokens, checkpoint) if tokens is not None and tokens.given else None
    return EvalJob(sides, read, per_block)
