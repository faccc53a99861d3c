"""`ptq eval`: how good is it, and is it good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_cli import api, display
from ptq_cli.cli.common import (
    PATH,
    check_report_path,
    emit_report,
    emit_warnings,
    gate_options,
    model_argument,
    report_options,
    source_options,
)
from ptq_cli.report import check_gates


@click.command("eval")
@model_argument("original")
@click.argument("quantized", type=PATH)
@source_options
@gate_options
@report_options
def evaluate(
    original: Path,
    quantized: Path,
    calibration: Path | None,
    activations: tuple[Path, ...],
    bf16: bool,
    max_rel_err: float | None,
    min_gain: float | None,
    max_fallbacks: int | None,
    report_path: Path | None,
    as_json: bool,
    top: int,
    strict: bool,
) -> None:
    """Measure QUANTIZED against the ORIGINAL weights, worst layers first.

    Everything is computed anew from the tensors: the errors, and those of round-to-nearest at the
    same grid. With calibration the errors are those of the outputs, on held-out inputs where there
    are any; without, those of the weights.

    \b
    ptq eval model.safetensors model-gptq-w4g128 --min-gain 1.5 --max-rel-err 0.05
    """
    check_report_path(report_path)
    with display.ProgressLine("eval", quiet=as_json) as line:

        def listen(done: int, total: int, row: Any) -> None:
            line(done, total, row.module)

        report = api.evaluate(
            original,
            quantized,
            calibration=calibration,
            activations=activations,
            bf16=bf16,
            listen=listen,
        )
    emit_warnings(report.warnings, strict)
    emit_report(report, report_path, as_json, top)
    check_gates(report, max_rel_err=max_rel_err, min_gain=min_gain, max_fallbacks=max_fallbacks)
