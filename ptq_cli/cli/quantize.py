"""The quantizing commands: options from the settings of their method, a job, its report."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ptq_cli.calibration.find import take_source
from ptq_cli.cli import shared_options as shared
from ptq_cli.cli.allocate import BUDGET, allocated_recipe
from ptq_cli.cli.common import check_report_paths, emit_warnings, finish, finished_already
from ptq_cli.cli.dry_run import emit_estimate
from ptq_cli.cli.options import Command, in_section, option, setting_options
from ptq_cli.cli.progress import Follow
from ptq_cli.commands.budget import METHODS
from ptq_cli.commands.job import Job, take_run_options
from ptq_cli.commands.quantize import prepare
from ptq_cli.core.settings import settings_fields
from ptq_cli.formats.runtimes import RUNTIMES
from ptq_cli.plan.grid_settings import (
    FLOAT_BITS,
    default_settings,
    may_stay_float,
    settings_classes,
)
from ptq_cli.plan.recipe import load_recipe
from ptq_cli.registry import SMOOTHERS

_HELP = {
    "gptq": """Quantize MODEL with GPTQ and report its error, layer by layer.

    MODEL is a .safetensors file, a *.safetensors.index.json, a .gguf file, or a model folder. With
    --tokens the model itself is run, and each layer is calibrated on what the rounded layers before
    it produce; else statistics of the inputs come from ptq calibrate, or from activations. For each
    layer the better of GPTQ and round-to-nearest on held-out inputs is written.

    \b
    ptq gptq model.safetensors --bits 4 --group-size 128
    ptq gptq model/ --bits 3 --asym --tokens tokens.npy
    ptq gptq model/ --bits 3 --asym --calibration stats.safetensors -o out
    ptq gptq model.gguf --scheme Q4_K_M --tokens tokens.npy -o model-Q4_K_M.gguf
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
    "smoothquant": """Smooth MODEL's inputs into its weights, and quantize both.

    Outlier channels of a site's inputs are divided by factors, and the weights are multiplied by
    them. The division is folded into the norm or linear that feeds the site, so the float model
    computes what it did, which is checked. The output has int8 weights per channel (W8A8), or with
    --bits 16 the smoothed float weights. A site where smoothing brings nothing is left as it was.

    With --tokens the model itself is run, and each site is smoothed and rounded on what the
    quantized layers before it produce, their inputs rounded as at run time.

    \b
    ptq smoothquant model/ --alpha auto
    ptq smoothquant model/ --tokens tokens.npy
    ptq smoothquant model/ --bits 16 -o smoothed
    ptq smoothquant model/ --activation-scheme static --then gptq
    """,
    "awq": """Scale up MODEL's weights where their inputs are large, and quantize them.

    For every layer rtn, awq, gptq and awq+gptq are compared on held-out inputs (the report's
    `compared` and `best`). What is written is awq, or with --then gptq awq+gptq; where a layer of
    a site would come out worse than plain rounding, the site is not scaled. With --tokens the
    model itself is run, and each site is scaled and rounded on what the quantized layers before it
    produce.

    \b
    ptq awq model/ --bits 4 --group-size 128
    ptq awq model/ --bits 3 --asym --tokens tokens.npy
    ptq awq model/ --bits 3 --then gptq
    """,
}

_FALLBACK, _CONFIG = in_section(
    "Method",
    option(
        "--fallback",
        type=click.Choice(["error", "rtn"]),
        default="error",
        show_default=True,
        help="For a layer without statistics, or whose Hessian cannot be factored: an error, or"
        " round-to-nearest.",
    ),
    option("--config", type=shared.FILE, help="A recipe (TOML); options win over it."),
)
_PARALLEL_LAYERS, _REQUIRE_CALIBRATION = in_section(
    "Calibration",
    option(
        "--parallel-layers",
        is_flag=True,
        help="With --tokens: calibrate every layer on the float model, not on what the rounded"
        " layers before it produce; faster.",
    ),
    option(
        "--require-calibration",
        is_flag=True,
        help="Fail where there is no calibration.",
    ),
)
(_RUNTIME,) = in_section(
    "Output",
    option(
        "--runtime",
        type=click.Choice(list(RUNTIMES)),
        help="Warn of what this runtime could not load (ptq check).",
    ),
)

_GATES = (*shared.GATE_OPTIONS, shared.ALLOW_WEAK)


def _parameters(name: str) -> list[click.Parameter]:
    """What a command takes."""
    classes, defaults = settings_classes(name), default_settings(name)
    settings = [
        *setting_options("Numbers", classes[0], defaults=defaults),
        *setting_options("Method", *classes[1:], defaults=defaults),
    ]
    if name == "pack":  # without calibration there is nothing to weigh errors with, and no cache
        settings = [x for x in settings if x.name not in ("weight", "kv_cache")]
    if may_stay_float(name):
        (bits,) = (setting for setting in settings if setting.name == "bits")
        bits.type = click.IntRange(2, FLOAT_BITS)
    fallback = [_FALLBACK] if name == "gptq" else []
    required = [] if name in SMOOTHERS else [_REQUIRE_CALIBRATION]  # these always need it
    imatrix = [] if name in SMOOTHERS else [shared.IMATRIX]  # these need inputs themselves
    sources = [*shared.TOKENS, shared.MIN_EXPERT_TOKENS, _PARALLEL_LAYERS, *shared.SOURCES]
    sources += [*imatrix, *required]
    sources = [] if name == "pack" else sources
    shown = f"<model>-{name}-w<bits>g<group>[-<format>], or <model>-{name}-<scheme>"
    place = (
        f"A folder; with --format gguf also FILE.gguf.  [default: {shown}, in the current folder]"
    )
    output = in_section("Output", option("-o", "--output", type=shared.DIR, help=place))
    run = [*shared.RUN, *shared.RESOURCES]
    writing = [_RUNTIME, shared.MAX_SHARD_SIZE, *shared.REPLACING]
    budget = BUDGET if name in METHODS else ()
    own = [*output, *settings, *budget, *fallback, _CONFIG, *sources, *writing]
    return [shared.path_argument("model"), *own, *run, *shared.REPORT, *_GATES]


def _command(name: str) -> click.Command:
    run = partial(_run, name)
    return Command(name, params=_parameters(name), callback=run, help=_HELP[name])


def _run(name: str, /, model: Path, **options: Any) -> None:
    """Plan, warn, run with progress, report, and see to the gates."""
    check_report_paths(options)
    shared.refuse_idle_allowance(options)
    job = _job(name, model, options)
    if job is None:
        return
    _refuse_unread(job, options)
    how = take_run_options(options)
    warnings = (*job.plan.warnings, *job.memory_warnings(how.resources))
    emit_warnings(warnings, options["strict"], job.plan.untried)
    if options["dry_run"]:
        emit_estimate(job.estimate(how), options["as_json"], warnings)
        return
    with Follow(name, options["quiet"]) as listen:
        report = job.run(replace(how, listen=listen))
    if report.earlier:
        finished_already(job.output)
    late = [warning for warning in report.warnings if warning not in job.plan.warnings]
    emit_warnings(late, strict=False)
    layers = job.plan.layers if job.checkpoint.root and job.checkpoint.config else ()
    source = job.source
    finish(report, options, str(job.output), written=True, layers=layers, source=source)
    emit_warnings(late if options["strict"] else (), options["strict"])


def _job(name: str, model: Path, options: dict[str, Any]) -> Job | None:
    """The job that the options ask for; None for the dry run of a budget that is not shared out
    yet."""
    path, known = options["config"], settings_fields(*settings_classes(name))
    recipe = {} if path is None else load_recipe(path, name)
    given = {field.name: options.get(field.name) for field, _ in known}
    words = ("output", "runtime", "fallback")
    where = {key: options[key] for key in words if key in options}
    if (given["bits"] or recipe.get("bits")) == FLOAT_BITS:
        _refuse_gates(options, "nothing is rounded; set the gate where these weights are quantized")
    if name in METHODS:
        found = allocated_recipe(name, model, options, given, recipe)
        if found is None:
            return None
        given, recipe = ({}, found) if found is not recipe else (given, recipe)
    return prepare(name, model, given, recipe, take_source(options), **where)


def _refuse_unread(job: Job, options: dict[str, Any]) -> None:
    """Options of the run that do nothing for what is done, or how it is stored."""
    if job.plan.method != "repack":
        return
    _refuse_gates(
        options,
        "repacking measures nothing, the codes stay as they are; set the gate on ptq eval ORIGINAL"
        " QUANTIZED",
    )
    for name in ("workers", "max_memory", "scheduler"):
        if options[name] is not None:
            word = name.replace("_", "-")
            raise click.UsageError(f"--{word} does nothing here: one process repacks")


def _refuse_gates(options: dict[str, Any], why: str) -> None:
    if gates := [*shared.gates_set(options)]:
        raise click.UsageError(f"--{gates[0].replace('_', '-')}: {why}")


gptq = _command("gptq")
rtn = _command("rtn")
pack = _command("pack")
smoothquant = _command("smoothquant")
awq = _command("awq")
