"""`ptq smoothquant` and `ptq awq`: one command a smoother, options from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq_cli import api, display
from ptq_cli.cli.common import (
    PATH,
    check_report_paths,
    emit_warnings,
    finish,
    gate_options,
    model_argument,
    report_options,
    resource_options,
    source_options,
)
from ptq_cli.config import load_recipe
from ptq_cli.options import add_options
from ptq_cli.registry import smoother
from ptq_cli.runner import Progress
from ptq_cli.smooth_job import FLOAT_BITS, SmoothJob, prepare_smoothing, smooth_settings

_HELP = {
    "smoothquant": """Smooth MODEL's inputs into its weights, and quantize both.

    Outlying channels of a site's inputs are divided by factors that the weights take over, folded
    into the norm or linear that feeds the site: the float model computes what it did, which is
    checked. Written are int8 weights per channel (W8A8), or with --bits 16 the smoothed float
    weights. A site where rounding is no better for it is left as it was.

    \b
    ptq smoothquant model/ --alpha auto
    ptq smoothquant model/ --bits 16 -o smoothed
    ptq smoothquant model/ --activation-scheme static --then gptq
    """,
    "awq": """Scale MODEL's weights where their inputs are loud, and quantize them.

    For every layer rtn, awq, gptq and awq+gptq are compared on held-out inputs (the report's
    `compared` and `best`). What is written is awq, or with --then gptq awq+gptq; where a layer of
    a site would come out worse than plain rounding, the site is not scaled.

    \b
    ptq awq model/ --bits 4 --group-size 128
    ptq awq model/ --bits 3 --then gptq
    """,
}


def _command(name: str) -> click.Command:
    def run(model: Path, **options: Any) -> None:
        _run(name, model, options)

    command: Any = run
    command = report_options(gate_options(resource_options(command)))
    command = click.option("--restart", is_flag=True, help="Drop an interrupted run's work.")(
        command
    )
    command = click.option("--force", is_flag=True, help="Replace an existing output.")(command)
    command = click.option(
        "-o",
        "--output",
        type=PATH,
        metavar="DIR",
        help=f"[default: <model>-{name}-w<bits><group> in the current folder]",
    )(command)
    command = click.option(
        "--config", type=PATH, metavar="FILE", help="A recipe (TOML); options win over it."
    )(command)
    command = source_options(command)
    command = add_options(*smooth_settings(name), defaults=smoother(name).defaults)(command)
    made: click.Command = click.command(name, help=_HELP[name])(model_argument()(command))
    for option in made.params:
        if name == "smoothquant" and option.name == "bits":
            option.type = click.IntRange(2, FLOAT_BITS)
    return made


def _run(name: str, model: Path, options: dict[str, Any]) -> None:
    check_report_paths(options)
    path = options.pop("config")
    recipe = {} if path is None else load_recipe(path, name, smooth_settings(name))
    where = {key: options.pop(key) for key in ("calibration", "activations", "bf16")}
    job = prepare_smoothing(name, model, options, recipe, output=options["output"], **where)
    emit_warnings(job.plan.warnings, options["strict"])
    report = _work(job, name, options)
    finish(report, options, str(job.output), written=True)


def _work(job: SmoothJob, name: str, options: dict[str, Any]) -> Any:
    resources = api.take_resources(options)
    with display.ProgressLine(name, quiet=options["as_json"]) as line:

        def listen(progress: Progress) -> None:
            line(progress.done, progress.total, progress.row.module)

        return job.run(
            force=options["force"],
            restart=options["restart"],
            resources=resources,
            listen=listen,
            listen_sites=line,
        )


smoothquant = _command("smoothquant")
awq = _command("awq")
