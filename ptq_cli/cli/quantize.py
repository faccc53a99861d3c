"""`ptq gptq`, `ptq rtn`, `ptq pack`: one command a method, options from its settings."""

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
from ptq_cli.cli.tokens import token_options
from ptq_cli.config import load_recipe
from ptq_cli.options import add_options
from ptq_cli.plan import GridSettings
from ptq_cli.registry import method
from ptq_cli.runner import Progress
from ptq_cli.runtimes import RUNTIMES

_HELP = {
    "gptq": """Quantize MODEL with GPTQ and report its error, layer by layer.

    MODEL is a .safetensors file, a *.safetensors.index.json, or a model folder. With --tokens the
    model itself is run, and each layer is calibrated on what the rounded layers before it produce;
    else statistics of the inputs come from ptq calibrate, or from activations. For each layer the
    better of GPTQ and round-to-nearest on held-out inputs is written.

    \b
    ptq gptq model.safetensors --bits 4 --group-size 128
    ptq gptq model/ --bits 3 --asym --tokens tokens.npy
    ptq gptq model/ --bits 3 --asym --calibration stats.safetensors -o out
    """,
    "rtn": """Round MODEL to nearest, each group's range searched for the least error.

    Statistics of the inputs, where there are any, weigh the search and measure the error.
    """,
    "pack": """Round the float MODEL to nearest and pack it, without calibration; or repack a
    quantized MODEL in another --format, without loss or not at all.

    \b
    ptq pack model.safetensors --bits 8 --group-size -1
    ptq pack model-gptq-w4g128/ --format gguf
    """,
}


_DEFAULTS = {"pack": {"mse": False}}  # where a command's own differ
_SOURCE = ("calibration", "activations", "bf16", "require_calibration")


def _command(name: str) -> click.Command:
    own = method("rtn" if name == "pack" else name).settings

    def run(model: Path, **options: Any) -> None:
        _run(name, own, model, options)

    command: Any = run
    command = gate_options(command)
    command = report_options(command)
    command = resource_options(command)
    command = click.option(
        "--max-shard-size",
        default="4GB",
        show_default=True,
        metavar="SIZE",
        help="Weights files hold at most SIZE.",
    )(command)
    command = click.option("--restart", is_flag=True, help="Drop an interrupted run's work.")(
        command
    )
    command = click.option("--force", is_flag=True, help="Replace an existing output.")(command)
    command = click.option(
        "-o",
        "--output",
        type=PATH,
        metavar="DIR",
        help=f"[default: <model>-{name}-w<bits>g<group>[-<format>] in the current folder]",
    )(command)
    command = click.option(
        "--runtime",
        type=click.Choice(list(RUNTIMES)),
        help="Warn of what this runtime could not load (ptq check).",
    )(command)
    command = click.option(
        "--config", type=PATH, metavar="FILE", help="A recipe (TOML); options win over it."
    )(command)
    if name != "pack":
        command = click.option(
            "--require-calibration", is_flag=True, help="Fail where there is no calibration."
        )(command)
        command = click.option(
            "--parallel-layers",
            is_flag=True,
            help="With --tokens: calibrate every layer on the float model, not on what the rounded"
            " layers before it produce; faster.",
        )(command)
        command = token_options(command)
        command = source_options(command)
    if name == "gptq":
        command = click.option(
            "--fallback",
            type=click.Choice(["error", "rtn"]),
            default="error",
            help="What a layer gets that has no statistics, or whose Hessian cannot be"
            " factored.  [default: error]",
        )(command)
    command = add_options(GridSettings, own, defaults=_DEFAULTS.get(name, {}))(command)
    command = model_argument()(command)
    return click.command(name, help=_HELP[name])(command)


def _run(name: str, own: type[Any], model: Path, options: dict[str, Any]) -> None:
    check_report_paths(options)
    recipe_path = options.pop("config")
    recipe = {} if recipe_path is None else load_recipe(recipe_path, name, (GridSettings, own))
    if name in _DEFAULTS:
        recipe = {**_DEFAULTS[name], **recipe}
    own_words = (*_SOURCE, "fallback", "runtime", "parallel_layers")
    where = {key: options.pop(key) for key in own_words if key in options}
    where["tokens"] = tokens = api.token_settings(options)
    if where.get("parallel_layers") and not tokens.given:
        raise click.UsageError("--parallel-layers needs --tokens or --text")
    job = api.prepare(name, model, options, recipe, output=options["output"], **where)
    resources = api.take_resources(options)
    warnings = (*job.plan.warnings, *job.memory_warnings(resources))
    emit_warnings(warnings, options["strict"])
    with display.ProgressLine(name, quiet=options["as_json"]) as line:

        def listen(progress: Progress) -> None:
            line(progress.done, progress.total, progress.row.module)

        report = job.run(
            force=options["force"],
            restart=options["restart"],
            resources=resources,
            max_shard_size=options["max_shard_size"],
            listen=listen,
        )
    for warning in report.warnings[len(job.plan.warnings) :]:
        display.warn(warning)
    finish(report, options, str(job.output), written=True)


gptq = _command("gptq")
rtn = _command("rtn")
pack = _command("pack")
