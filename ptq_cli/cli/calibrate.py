"""`ptq calibrate`: activations in, one statistics file out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ptq_cli.calibration.find import take_source
from ptq_cli.cli import console
from ptq_cli.cli import shared_options as shared
from ptq_cli.cli.common import emit_warnings, finished_already, show_next
from ptq_cli.cli.dry_run import emit_estimate
from ptq_cli.cli.next_steps import after_calibration
from ptq_cli.cli.options import Command, in_section, option
from ptq_cli.cli.progress import Follow
from ptq_cli.commands.calibrate import CalibrateJob, default_target, prepare_calibration
from ptq_cli.commands.job import take_run_options
from ptq_cli.core.text import number
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT

_PARAMETERS = (
    shared.path_argument("model"),
    *in_section(
        "Output",
        option(
            "-o",
            "--output",
            type=shared.FILE,
            help="[default: <model>.calibration.safetensors beside MODEL]",
        ),
        option(
            "--imatrix-out",
            type=shared.FILE,
            help="Write an importance matrix for llama.cpp, too.",
        ),
    ),
    *shared.REPLACING,
    *in_section(
        "Calibration",
        *shared.TOKENS,
        shared.MIN_EXPERT_TOKENS,
        option(
            "--activations",
            type=shared.PATH,
            multiple=True,
            help="Folder of <module>.npy (or <module>/*.npy), or such a file; may be repeated."
            "  [default: activations/ beside MODEL]",
        ),
        shared.BF16,
        option(
            "--gradients",
            type=shared.DIR,
            multiple=True,
            help="Folder of per-sample gradients <module>.npy, [n, *weight] or [n, P]: their"
            " diagonal Fisher information is stored, too.",
        ),
        option(
            "--merge",
            type=shared.FILE,
            multiple=True,
            help="Merge statistics files instead; may be repeated.",
        ),
        option(
            "--fallback",
            type=click.Choice(["error", "rtn"]),
            help="For linears without activations: an error, or leave them to round-to-nearest."
            "  [default: error]",
        ),
        option(
            "--heldout-every",
            type=click.IntRange(0),
            metavar="N",
            help="Hold out every N-th token (with --tokens: sequence), to measure errors on;"
            " 0: none."
            f"  [default: {HELDOUT_EVERY}]",
        ),
        option(
            "--heldout-limit",
            type=click.IntRange(0),
            metavar="N",
            help=f"Hold out at most N tokens a site.  [default: {HELDOUT_LIMIT}]",
        ),
    ),
    *shared.RUN,
    *shared.RESOURCES,
    shared.JSON,
)
# What does not read an option, and the reason.
_UNREAD = {
    "merge": ("bf16", "fallback", "heldout_every", "heldout_limit"),
    "tokens": ("bf16", "fallback"),
    "text": ("bf16", "fallback"),
    "chat": ("bf16", "fallback"),
}


@click.command("calibrate", cls=Command, params=list(_PARAMETERS))
def calibrate(model: Path, **options: Any) -> None:
    """Stream the inputs of MODEL's linears into one statistics file.

    They come from --activations, or from running the model on --tokens, --text or
    --chat.

    Activations are <module>.npy, [..., in_features], float16, float32 or float64. Linears that
    share an input (q, k and v; gate and up) need one file among them. The file holds the Hessian,
    ranges and percentiles of each site, and inputs held out to measure errors on.

    \b
    ptq calibrate model/ --tokens tokens.npy
    ptq calibrate model.safetensors --activations acts/
    ptq calibrate model.safetensors --merge a.safetensors --merge b.safetensors
    """
    _refuse_unread(options)
    job, strict = _job(model, options), options["strict"]
    how = take_run_options(options)
    if options["dry_run"]:
        emit_estimate(job.estimate(how), options["as_json"], (), strict)
        return
    emit_warnings(job.warnings, strict)
    with Follow("calibrate", options["quiet"]) as listen:
        result = job.run(replace(how, listen=listen), lambda text: emit_warnings([text], strict))
    if earlier := result.pop("earlier"):
        finished_already(result["output"])
    if options["as_json"]:
        console.print_json(result)
        return
    _show(result, earlier)
    show_next([after_calibration(model, job.output, default_target(job.checkpoint))])


def _job(model: Path, options: dict[str, Any]) -> CalibrateJob:
    """The job that the options ask for."""
    merge, gradients, every, limit = (
        options[key] for key in ("merge", "gradients", "heldout_every", "heldout_limit")
    )
    source = take_source(options)
    if bool(merge) + bool(source.activations or gradients) + source.tokens.given > 1:
        raise click.UsageError(
            "--merge excludes --activations and --gradients, and --tokens excludes all of them"
        )
    job = prepare_calibration(
        model,
        source,
        merge=merge,
        gradients=gradients,
        heldout=(
            HELDOUT_EVERY if every is None else every,
            HELDOUT_LIMIT if limit is None else limit,
        ),
        missing=options["fallback"] or "error",
        output=options["output"],
    )
    return replace(job, imatrix_out=options["imatrix_out"])


def _refuse_unread(given: Mapping[str, Any]) -> None:
    """Options that do nothing. given: the parameters of the command"""
    for way, names in _UNREAD.items():
        idle = [name for name in names if given[name] is not None and given[name] is not False]
        if given[way] and idle:
            raise click.UsageError(f"--{idle[0].replace('_', '-')} does nothing with --{way}")
    if given["heldout_every"] == 0 and given["heldout_limit"] is not None:
        raise click.UsageError("--heldout-limit does nothing with --heldout-every 0")


def _show(result: dict[str, Any], earlier: bool) -> None:
    sites = result["sites"]
    console.table(
        ("site", "linears", "tokens", "std", "absmax", "p99"),
        [
            [
                site,
                str(len(entry["linears"])),
                str(entry["n_tokens"]),
                number(entry["std"]),
                number(max(-entry["min"], entry["max"])),
                number(entry["p99"]),
            ]
            for site, entry in sites.items()
        ],
    )
    written = "" if earlier else f"; written: {result['output']}"
    console.line(f"{len(sites)} sites{written}")
