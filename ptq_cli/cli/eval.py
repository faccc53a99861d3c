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
from ptq_cli.cli.tokens import token_options
from ptq_cli.numerics.activations import SCHEMES
from ptq_cli.report import check_gates
from ptq_cli.sources import take_tokens


@click.command("eval")
@model_argument("original")
@click.argument("quantized", type=PATH)
@source_options
@token_options
@click.option(
    "--kl-per-block",
    is_flag=True,
    help="With --tokens: the KL divergence that each block alone makes when it is quantized.",
)
@click.option(
    "--max-perplexity-increase",
    type=float,
    metavar="X",
    help="Fail where the perplexity on --tokens rises by more than X.",
)
@click.option(
    "--max-kl",
    type=float,
    metavar="X",
    help="Fail where the mean KL divergence on --tokens is above X nats.",
)
@click.option(
    "--activation-scheme",
    type=click.Choice(SCHEMES),
    help="Measure the outputs with integer inputs, too: a scale per token, per tensor, or static.",
)
@click.option(
    "--activation-bits",
    type=click.Choice(["8", "4"]),
    help="Bits of integer inputs.  [default: 8]",
)
@click.option(
    "--percentile",
    type=float,
    default=1.0,
    show_default=True,
    metavar="P",
    help="Range of integer inputs: this part of their absolute values, in (0, 1].",
)
@gate_options
@report_options
def evaluate(
    original: Path,
    quantized: Path,
    calibration: Path | None,
    activations: tuple[Path, ...],
    bf16: bool,
    kl_per_block: bool,
    max_perplexity_increase: float | None,
    max_kl: float | None,
    activation_scheme: str | None,
    activation_bits: str | None,
    percentile: float,
    max_rel_err: float | None,
    min_gain: float | None,
    max_fallbacks: int | None,
    report_path: Path | None,
    as_json: bool,
    top: int,
    strict: bool,
    **tokens: Any,
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
    check_report_path(report_path)
    settings = take_tokens(tokens)
    wants = kl_per_block or max_perplexity_increase is not None or max_kl is not None
    if wants and not settings.given:
        raise click.UsageError("perplexity and KL need --tokens or --text")
    inputs = activation_bits is not None or percentile != 1.0
    if inputs and activation_scheme in (None, "none"):
        raise click.UsageError("--activation-bits and --percentile need --activation-scheme")
    with display.ProgressLine("eval", quiet=as_json) as line:

        def listen(done: int, total: int, row: Any) -> None:
            line(done, total, getattr(row, "module", str(row)))

        report = api.evaluate(
            original,
            quantized,
            calibration=calibration,
            activations=activations,
            bf16=bf16,
            tokens=settings,
            kl_per_block=kl_per_block,
            activation_scheme=activation_scheme,
            activation_bits=None if activation_bits is None else int(activation_bits),
            percentile=percentile,
            listen=listen,
        )
    emit_warnings(report.warnings, strict)
    emit_report(report, report_path, as_json, top)
    check_gates(
        report,
        max_rel_err=max_rel_err,
        min_gain=min_gain,
        max_fallbacks=max_fallbacks,
        max_perplexity_increase=max_perplexity_increase,
        max_kl=max_kl,
    )
