"""What the quantizing commands share: options, and the run of a job from warnings to gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ptq_cli.calibration.find import SourceSettings, take_source
from ptq_cli.cli import console
from ptq_cli.cli.common import (
    GATES,
    PATH,
    check_report_paths,
    emit_warnings,
    finish,
    finished_already,
    gate_options,
    report_options,
    resource_options,
)
from ptq_cli.cli.dry_run import dry_run_option, emit_forecast
from ptq_cli.cli.progress import Follow
from ptq_cli.formats.runtimes import RUNTIMES
from ptq_cli.plan.recipe import load_recipe
from ptq_cli.run.schedule import take_resources

C = TypeVar("C", bound=Callable[..., Any])


def quantizing_options(name: str, output: str) -> Callable[[C], C]:
    """Recipe, runtime, output, resources, report and gates. output: the default's form, in words"""

    def decorate(command: C) -> C:
        for option in (
            gate_options,
            report_options,
            resource_options,
            click.option(
                "--max-shard-size",
                default="4GB",
                show_default=True,
                metavar="SIZE",
                help="Weights files hold at most SIZE.",
            ),
            dry_run_option,
            click.option("--restart", is_flag=True, help="Drop an interrupted run's work."),
            click.option("--force", is_flag=True, help="Replace an existing output."),
            click.option(
                "-o",
                "--output",
                type=PATH,
                metavar="DIR",
                help=f"[default: <model>-{name}-{output} in the current folder]",
            ),
            click.option(
                "--runtime",
                type=click.Choice(list(RUNTIMES)),
                help="Warn of what this runtime could not load (ptq check).",
            ),
            click.option(
                "--config", type=PATH, metavar="FILE", help="A recipe (TOML); options win over it."
            ),
        ):
            command = option(command)
        return command

    return decorate


def take_recipe(
    name: str, options: dict[str, Any], classes: tuple[type[Any], ...], *, floats: bool = False
) -> Any:
    """Take `config` out of `options`: the settings of that recipe. floats: whose weights may stay
    floats"""
    path: Path | None = options.pop("config")
    return {} if path is None else load_recipe(path, name, classes, floats=floats)


def take_sources(options: dict[str, Any]) -> SourceSettings:
    """Take where statistics come from out of `options`."""
    source = take_source(options)
    if source.parallel_layers and not source.tokens.given:
        raise click.UsageError("--parallel-layers needs --tokens or --text")
    if options.get("drift") is not None and (source.parallel_layers or not source.tokens.given):
        raise click.UsageError(
            "--drift corrects for the layers before, which takes --tokens or --text without"
            " --parallel-layers"
        )
    return source


def _check_measurable(method: str, options: dict[str, Any]) -> None:
    gates = [name for name in GATES if options.get(name) is not None]
    if method == "repack" and gates:
        raise click.UsageError(
            f"--{gates[0].replace('_', '-')}: repacking measures nothing, the codes stay as they"
            " are; set the gate on ptq eval ORIGINAL QUANTIZED"
        )


def run_command(name: str, prepare: Callable[[], Any], options: dict[str, Any]) -> None:
    """Plan, warn, run with progress, report, and see to the gates.

    prepare: gives the job. options: those of `quantizing_options`
    """
    check_report_paths(options)
    resources = take_resources(options)
    job = prepare()
    _check_measurable(job.plan.method, options)
    warnings = (*job.plan.warnings, *job.memory_warnings(resources))
    emit_warnings(warnings, options["strict"])
    how = {
        "force": options["force"],
        "restart": options["restart"],
        "resources": resources,
        "max_shard_size": options["max_shard_size"],
    }
    if options["dry_run"]:
        emit_forecast(job.forecast(**how), options["as_json"], options["top"], warnings)
        return
    with Follow(name, options["quiet"]) as listen:
        report = job.run(**how, listen=listen)
    if report.earlier:
        finished_already(job.output)
    for warning in report.warnings:
        if warning not in job.plan.warnings:
            console.warn(warning)
    layers = job.plan.layers if job.checkpoint.root and job.checkpoint.config else ()
    source = job.source.statistics
    finish(report, options, str(job.output), written=True, layers=layers, source=source)
