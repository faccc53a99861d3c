"""`ptq calibrate`: activations in, one statistics file out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_cli.calibration.find import take_tokens
from ptq_cli.cli import console
from ptq_cli.cli.common import (
    PATH,
    emit_warnings,
    finished_already,
    model_argument,
    resource_options,
    show_next,
)
from ptq_cli.cli.dry_run import dry_run_option, emit_forecast
from ptq_cli.cli.next_steps import after_calibration
from ptq_cli.cli.progress import Follow
from ptq_cli.cli.tokens import token_options
from ptq_cli.commands import api
from ptq_cli.commands.calibrate import default_target, prepare_calibration
from ptq_cli.core.text import number
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT
from ptq_cli.run.schedule import take_resources
from ptq_cli.storage.checkpoint import open_checkpoint


@click.command("calibrate")
@model_argument()
@click.option(
    "--activations",
    type=PATH,
    multiple=True,
    metavar="PATH",
    help="Folder of <module>.npy (or <module>/*.npy), or such a file; may be repeated."
    "  [default: activations/ beside MODEL]",
)
@token_options
@click.option(
    "--gradients",
    type=PATH,
    multiple=True,
    metavar="DIR",
    help="Folder of per-sample gradients <module>.npy, [n, *weight] or [n, P]: their diagonal"
    " Fisher information is stored, too.",
)
@click.option(
    "--merge",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Merge statistics files instead; repeat it.",
)
@click.option("--bf16", is_flag=True, help="uint16 activations are bfloat16.")
@click.option(
    "--heldout-every",
    type=click.IntRange(0),
    default=HELDOUT_EVERY,
    show_default=True,
    metavar="N",
    help="Hold out every N-th token, to measure errors on; 0: none.",
)
@click.option(
    "--heldout-limit",
    type=click.IntRange(0),
    default=HELDOUT_LIMIT,
    show_default=True,
    metavar="N",
    help="Hold out at most N tokens a site.",
)
@click.option(
    "--fallback",
    type=click.Choice(["error", "rtn"]),
    default="error",
    show_default=True,
    help="What linears without activations are: an error, or left to round-to-nearest.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="FILE",
    help="[default: <model>.calibration.safetensors beside MODEL]",
)
@resource_options
@dry_run_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--restart", is_flag=True, help="Drop an interrupted run's work.")
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def calibrate(
    model: Path,
    activations: tuple[Path, ...],
    gradients: tuple[Path, ...],
    merge: tuple[Path, ...],
    *,
    bf16: bool,
    heldout_every: int,
    heldout_limit: int,
    fallback: str,
    output: Path | None,
    dry_run: bool,
    force: bool,
    restart: bool,
    strict: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Stream the inputs of MODEL's linears into one statistics file.

    They come from --activations, or from running the model on --tokens or --text.

    Activations are <module>.npy, [..., in_features], float16, float32 or float64. Linears that
    share an input (q, k and v; gate and up) need one file among them. The file holds the Hessian,
    ranges and percentiles of each site, and inputs held out to measure errors on.

    \b
    ptq calibrate model/ --tokens tokens.npy
    ptq calibrate model.safetensors --activations acts/
    ptq calibrate model.safetensors --merge a.safetensors --merge b.safetensors
    """
    settings = take_tokens(options)
    if bool(merge) + bool(activations or gradients) + settings.given > 1:
        raise click.UsageError(
            "--merge excludes --activations and --gradients, and --tokens excludes all of them"
        )
    resources = take_resources(options)
    if dry_run:
        job = prepare_calibration(
            model,
            activations,
            output,
            tokens=settings,
            merge=merge,
            gradients=gradients,
            bf16=bf16,
            heldout=(heldout_every, heldout_limit),
            missing=fallback,
        )
        forecast = job.forecast(force=force, restart=restart, resources=resources)
        emit_forecast(forecast, as_json, 0, (), strict)
        return
    with Follow("calibrate", quiet) as listen:
        result = api.calibrate(
            model,
            activations,
            output,
            tokens=settings,
            merge=merge,
            gradients=gradients,
            bf16=bf16,
            heldout_every=heldout_every,
            heldout_limit=heldout_limit,
            missing=fallback,
            force=force,
            restart=restart,
            resources=resources,
            listen=listen,
            warn=lambda warning: emit_warnings([warning], strict),
        )
    if result.pop("earlier"):
        finished_already(result["output"])
    if as_json:
        console.print_json(result)
    else:
        _show(result)
        default = default_target(open_checkpoint(model))
        show_next([after_calibration(model, output or default, default)])


def _show(result: dict[str, object]) -> None:
    sites = result["sites"]
    assert isinstance(sites, dict)
    console.table(
        [
            ("site", "left"),
            ("linears", "right"),
            ("tokens", "right"),
            ("std", "right"),
            ("absmax", "right"),
            ("p99", "right"),
        ],
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
    console.line(f"{len(sites)} sites; written: {result['output']}")
