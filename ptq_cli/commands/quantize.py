"""`gptq`, `rtn` and `pack` as jobs: settings in, a plan, a job that gives a report."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptq_cli.calibration.find import BESIDE, AnyPath, SourceSettings, find_source
from ptq_cli.commands.estimate import estimate_quantization
from ptq_cli.commands.job import Job, default_output, fingerprints, with_scheme, with_warnings
from ptq_cli.commands.repack import prepare_repack
from ptq_cli.core.settings import make_settings
from ptq_cli.plan.grid_settings import SCHEME_INPUTS, GridSettings, default_settings
from ptq_cli.plan.plan import make_plan
from ptq_cli.plan.unused_options import refuse_unused
from ptq_cli.registry import format_named, method
from ptq_cli.run.loop import quantize
from ptq_cli.run.unit_job import Rounding
from ptq_cli.run.work import Quantization
from ptq_cli.storage.folder import holds_quantized, open_float


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
) -> Job:
    """Plan a quantization: every mistake that can be known is found here.

    command: "gptq", "rtn", or "pack" (plain rounding to nearest, without calibration)
    given, recipe: settings by name; `given` wins
    runtime: warn of what this runtime could not load (`check`)
    """
    packs = command == "pack"
    if packs and holds_quantized(Path(model)):
        return prepare_repack(Path(model), given, recipe, output, runtime)
    how = method("rtn" if packs else command)
    values = {**default_settings(command), **with_scheme(given, recipe)}
    settings = make_settings(GridSettings, given, values)
    own = make_settings(how.settings, given, values)
    checkpoint = open_float(Path(model))
    found = None
    if not packs:
        found = find_source(checkpoint, source, correct=how.corrects_drift(own))
    plan = make_plan(
        checkpoint,
        how,
        settings,
        own,
        format_named(settings.format),
        found,
        missing=fallback,
        activation=SCHEME_INPUTS.get(settings.scheme),
    )
    facts = {"calibration": found is not None, "in_sequence": source.in_sequence}
    refuse_unused(command, given, recipe, (settings, own), **facts)
    plan = with_warnings(plan, checkpoint, found, runtime)
    work = Quantization(
        command=command,
        plan=plan,
        checkpoint=checkpoint,
        source=found,
        rounding=Rounding(how.name, own, settings.format, fallback),
        inputs=fingerprints(checkpoint, found),
    )
    target = Path(default_output(checkpoint, command, settings) if output is None else output)
    identity = {"fallback": fallback}
    start, look = partial(quantize, work), partial(estimate_quantization, work)
    return Job(command, plan, checkpoint, found, target, identity, start, look)
