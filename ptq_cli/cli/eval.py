"""`ptq eval`: how good is it, and is it good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_cli.calibration.find import SourceSettings, find_source, take_tokens
from ptq_cli.cli.common import check_report_paths, emit_warnings, finish
from ptq_cli.cli.dry_run import emit_forecast
from ptq_cli.cli.progress import Follow
from ptq_cli.cli.sections import Command, option
from ptq_cli.cli.shared_options import (
    DRY_RUN,
    GATE_OPTIONS,
    GATES_OF_PREDICTIONS,
    QUIET,
    REPORT,
    SOURCES,
    STRICT,
    TOKENS,
    path_argument,
)
from ptq_cli.commands import api
from ptq_cli.commands.evaluate import prepare_evaluation
from ptq_cli.numerics.activations import SCHEMES
from ptq_cli.storage.checkpoint import open_checkpoint

_PARAMETERS = (
    path_argument("original"),
    path_argument("quantized"),
    option(
        "Numbers",
        "--activation-scheme",
        type=click.Choice(SCHEMES),
        help="Measure the outputs with integer inputs, too: a scale per token, per tensor, or"
        " static.",
    ),
    option(
        "Numbers",
        "--activation-bits",
        type=click.Choice(["8", "4"]),
        help="Bits of integer inputs.  [default: 8]",
    ),
    option(
        "Numbers",
        "--percentile",
        type=float,
        metavar="P",
        help="Range of integer inputs: this part of their absolute values, in (0, 1]."
        "  [default: 1.0]",
    ),
    *TOKENS,
    *SOURCES,
    DRY_RUN,
    STRICT,
    QUIET,
    *REPORT,
    option(
        "Report",
        "--kl-per-block",
        is_flag=True,
        help="With --tokens: the KL divergence that each block alone makes when it is quantized.",
    ),
    *GATE_OPTIONS,
    *GATES_OF_PREDICTIONS,
)


@click.command("eval", cls=Command, params=list(_PARAMETERS))
def evaluate(
    original: Path,
    quantized: Path,
    calibration: Path | None,
    activations: tuple[Path, ...],
    bf16: bool,
    kl_per_block: bool,
    activation_scheme: str | None,
    activation_bits: str | None,
    percentile: float | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Measure QUANTIZED against the ORIGINAL weights, worst layers first.

    Everything is computed anew from the tensors: the errors, and those of round-to-nearest at the
    same grid. With calibration the errors are those of the outputs, on held-out inputs where there
    are any; without, those of the weights.

    With --tokens both models are run, and beside them the original rounded to nearest at the same
    grid: perplexity, its increase with a standard error (clustered by sequence), KL divergence of
    the next-token distributions, and the share of equal top tokens. Where QUANTIZED says that its
    inputs are rounded too (W8A8), they are in these runs: per token, with the static scale of the
    file, or with one scale for each batch that the forward takes at once.

    \b
    ptq eval model/ model-gptq-w4g128 --tokens tokens.npy --max-kl 0.01
    ptq eval model.safetensors model-gptq-w4g128 --min-gain 1.5 --max-rel-err 0.05
    """
    check_report_paths(options)
    settings = take_tokens(options)
    predictions = ("max_perplexity_increase", "max_kl")
    wants = kl_per_block or any(options[name] is not None for name in predictions)
    if wants and not settings.given:
        raise click.UsageError("perplexity and KL need --tokens or --text")
    bits = None if activation_bits is None else int(activation_bits)
    inputs = bits is not None or percentile is not None
    part = 1.0 if percentile is None else percentile
    if inputs and activation_scheme in (None, "none"):
        raise click.UsageError("--activation-bits and --percentile need --activation-scheme")
    if dry_run:
        activation = api.evaluated_inputs(activation_scheme, bits, part)
        source = SourceSettings(calibration, activations, bf16)
        job = prepare_evaluation(
            original, quantized, source, settings, activation, per_block=kl_per_block
        )
        emit_forecast(job.forecast(), options["as_json"], options["top"], (), options["strict"])
        return
    with Follow("eval", options["quiet"]) as listen:
        report = api.evaluate(
            original,
            quantized,
            calibration=calibration,
            activations=activations,
            bf16=bf16,
            tokens=settings,
            kl_per_block=kl_per_block,
            activation_scheme=activation_scheme,
            activation_bits=bits,
            percentile=part,
            listen=listen,
        )
    emit_warnings(report.warnings, options["strict"])
    inputs_seen = None
    if options["html"] is not None:
        named = SourceSettings(calibration, activations, bf16)
        inputs_seen = find_source(open_checkpoint(original), named).statistics
    finish(report, options, str(quantized), written=False, source=inputs_seen)
