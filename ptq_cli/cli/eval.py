"""`ptq eval`: how good is it, and is it good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_cli.calibration.find import take_source
from ptq_cli.cli import shared_options as shared
from ptq_cli.cli.common import check_report_paths, emit_warnings, finish
from ptq_cli.cli.dry_run import emit_estimate
from ptq_cli.cli.options import Command, in_section, option
from ptq_cli.cli.progress import Follow
from ptq_cli.commands.evaluate import EvalJob, prepare_evaluation
from ptq_cli.numerics.activations import SCHEMES

_PARAMETERS = (
    shared.path_argument("original"),
    shared.path_argument("quantized"),
    *in_section(
        "Numbers",
        option(
            "--activation-scheme",
            type=click.Choice(SCHEMES),
            help="Measure the outputs with integer inputs, too: a scale per token, per tensor, or"
            " static.",
        ),
        option(
            "--activation-bits",
            type=click.Choice(["8", "4"]),
            help="Bits of integer inputs.  [default: 8]",
        ),
        option(
            "--percentile",
            type=float,
            metavar="P",
            help="Range of dynamic integer inputs: this quantile of their absolute values, in"
            " (0, 1]."
            "  [default: 1.0]",
        ),
    ),
    *shared.TOKENS,
    shared.MIN_EXPERT_TOKENS,
    *shared.SOURCES,
    *shared.RUN,
    *in_section(
        "Report",
        *shared.REPORT,
        option(
            "--kl-per-block",
            is_flag=True,
            help="With --tokens: the KL divergence that each block alone makes when it is"
            " quantized.",
        ),
    ),
    *shared.GATE_OPTIONS,
    shared.ALLOW_WEAK,
    *shared.GATES_OF_PREDICTIONS,
)


@click.command("eval", cls=Command, params=list(_PARAMETERS))
def evaluate(original: Path, quantized: Path, **options: Any) -> None:
    """Measure QUANTIZED against the ORIGINAL weights, worst layers first.

    Everything is computed anew from the tensors: the errors, and those of round-to-nearest at the
    same grid. With calibration the errors are those of the outputs, on held-out inputs where there
    are any; without, those of the weights.

    With --tokens both models are run, and beside them the original rounded to nearest at the same
    grid: perplexity, its increase with a standard error (clustered by sequence), KL divergence of
    the next-token distributions, and the share of equal top tokens. Where QUANTIZED says that its
    inputs are rounded too (W8A8), they are in these runs: per token, with the static scale of the
    file, or with one scale for each batch that the forward takes at once. So are the keys and
    values that attention caches, where it has scales of them (--kv-cache).

    \b
    ptq eval model/ model-gptq-w4g128 --tokens tokens.npy --max-kl 0.01
    ptq eval model.safetensors model-gptq-w4g128 --min-gain 1.5 --max-rel-err 0.05
    """
    check_report_paths(options)
    shared.refuse_idle_allowance(options)
    job = _job(original, quantized, options)
    if options["dry_run"]:
        emit_estimate(job.estimate(), options["as_json"], (), options["strict"])
        return
    with Follow("eval", options["quiet"]) as listen:
        report = job.run(listen)
    emit_warnings(report.warnings, options["strict"], job.notes)
    finish(report, options, str(quantized), written=False, source=job.sides.source)


def _job(original: Path, quantized: Path, options: dict[str, Any]) -> EvalJob:
    """The job that the options ask for."""
    source, per_block = take_source(options), options["kl_per_block"]
    limits = (options["max_perplexity_increase"], options["max_kl"])
    if not source.tokens.given and (per_block or limits != (None, None)):
        raise click.UsageError("perplexity and KL need --tokens, --text or --chat")
    scheme, bits = options["activation_scheme"], options["activation_bits"]
    inputs = {"bits": None if bits is None else int(bits), "percentile": options["percentile"]}
    if scheme in (None, "none") and inputs != {"bits": None, "percentile": None}:
        raise click.UsageError("--activation-bits and --percentile need --activation-scheme")
    return prepare_evaluation(
        original, quantized, source, per_block=per_block, scheme=scheme, **inputs
    )
