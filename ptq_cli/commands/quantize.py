"""The quantizing commands as jobs: settings in, a plan, a job that gives a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptq_cli.calibration.find import BESIDE, AnyPath, SourceSettings, find_source
from ptq_cli.commands import job as jobs
from ptq_cli.commands.estimate import estimate_repack
from ptq_cli.commands.smooth import prepare_smoothing
from ptq_cli.core.settings import make_settings
from ptq_cli.errors import InputError
from ptq_cli.plan.grid_settings import GridSettings, default_settings
from ptq_cli.plan.mixes import is_mix
from ptq_cli.plan.plan import make_plan
from ptq_cli.plan.schemes import SCHEMES, scheme_inputs, scheme_settings
from ptq_cli.plan.unused_options import refuse_unused
from ptq_cli.registry import SMOOTHERS, format_named, method
from ptq_cli.run.quantize_unit import Rounding
from ptq_cli.run.repack import RepackSettings, plan_repack, run_repack
from ptq_cli.run.work import Quantization
from ptq_cli.storage.quantized import QuantizedFolder, holds_quantized, open_quantized
from ptq_cli.storage.sources import open_float


def prepare(
    command: str,
    model: AnyPath,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any] = {},
    source: SourceSettings = BESIDE,
    *,
    output: AnyPath | None = None,
    fallback: str = "error",
    runtime: str | None = None,
) -> jobs.Job:
    """Plan a quantization: every mistake that can be known is found here.

    command: a method, a smoother, or "pack" (plain rounding to nearest, without calibration)
    given, recipe: settings by name; `given` wins
    fallback: of a method, where a layer has no statistics: "error", or "rtn"
    runtime: warn of what this runtime could not load (`check`)
    """
    if command in SMOOTHERS:
        return prepare_smoothing(command, model, given, recipe, source, output, runtime)
    packs = command == "pack"
    if packs and holds_quantized(Path(model)):
        return _prepare_repack(Path(model), given, recipe, output, runtime)
    how = method("rtn" if packs else command)
    values = {**default_settings(command), **jobs.with_scheme(given, recipe)}
    settings = make_settings(GridSettings, given, values)
    jobs.check_mix(settings.scheme, given, recipe)
    own = make_settings(how.settings, given, values)
    checkpoint = open_float(Path(model), any_architecture=by_names_alone(settings, source))
    found = None
    if not packs:
        correct, couple = how.corrects_drift(own), how.couples_rows(own)
        found = find_source(
            checkpoint, source, correct=correct, couple=couple, hessians=how.needs_hessian
        )
    plan = make_plan(
        checkpoint,
        how,
        settings,
        own,
        format_named(settings.format),
        found,
        missing=fallback,
        activation=scheme_inputs(settings.scheme),
    )
    facts = {
        "calibration": found is not None,
        "in_sequence": source.in_sequence,
        "tokens": source.tokens.given,
        "mix": is_mix(settings.scheme),
    }
    refuse_unused(command, given, recipe, (settings, own), **facts)
    plan = jobs.with_warnings(plan, checkpoint, found, runtime)
    target = jobs.default_output(checkpoint, command, settings) if output is None else output
    rounding = Rounding(how.name, own, settings.format, fallback, settings.global_scale)
    inputs = jobs.fingerprints(checkpoint, found)
    work = Quantization(command, plan, checkpoint, found, rounding, settings, inputs)
    return jobs.quantization_job(work, target, {"fallback": fallback})


def by_names_alone(settings: GridSettings, source: SourceSettings) -> bool:
    """Whether a model in GGUF need not be understood: its file is copied, and nobody runs it."""
    return format_named(settings.format).container == "gguf" and not source.tokens.given


def _kept(folder: QuantizedFolder, words: str) -> str:
    """Why options that would change codes cannot be had; words: their names."""
    if "ptq" in folder.checkpoint.metadata:  # this tool's own output
        return f"quantized already, so its codes stay as they are: {words} has no effect"
    return (
        f"quantized already, in format {folder.fmt.name}, which pack repacks as it is, without"
        f" {words}"
    )


def _prepare_repack(
    path: Path,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any],
    output: AnyPath | None,
    runtime: str | None,
) -> jobs.Job:
    """Plan a repacking: the codes stay, so bits, zeros and methods cannot be chosen."""
    folder = open_quantized(path)
    known = {field.name for field in dataclasses.fields(RepackSettings)}
    own = {**recipe, **{key: value for key, value in given.items() if value not in (None, ())}}
    scheme = SCHEMES.get(own.get("scheme", ""))
    if is_mix(own.get("scheme", "")) or (scheme is not None and not scheme.fixed):
        known -= {"scheme"}
    other = sorted(own.keys() - known)
    if other:
        words = ", ".join("--" + key.replace("_", "-") for key in other)
        raise InputError(
            f"{path}: {_kept(folder, words)}",
            hint="start from the float model, or take it as a source: ptq rtn",
        )
    own = {"format": scheme_settings(own.get("scheme", "")).get("format", "ptq"), **own}
    settings = RepackSettings(**{key: own[key] for key in known & own.keys()})
    stem = path.resolve().name.removesuffix(".gguf").removesuffix(".safetensors")
    target = Path(f"{stem}-{settings.format}") if output is None else Path(output)
    jobs.check_output_name(target, settings.format)
    checkpoint, fmt = folder.checkpoint, format_named(settings.format)

    def job(*, trial: bool) -> jobs.Job:
        repack = plan_repack(folder, fmt, settings, trial=trial)
        plan = jobs.with_warnings(repack.plan, checkpoint, None, runtime)
        repack = dataclasses.replace(repack, plan=plan)
        start = partial(run_repack, repack, jobs.fingerprints(checkpoint, None))
        look, identity = partial(estimate_repack, repack), {"command": "repack"}
        return jobs.Job("pack", plan, checkpoint, None, target, identity, start, look)

    glance = job(trial=False)
    return glance if glance.target().complete() else job(trial=True)
