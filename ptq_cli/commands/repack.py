"""`pack` of what is quantized already, as a job: settings in, a plan, a job that gives a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptq_cli.calibration.find import AnyPath
from ptq_cli.commands.estimate import estimate_repack
from ptq_cli.commands.job import Job, fingerprints, with_warnings
from ptq_cli.errors import InputError
from ptq_cli.registry import format_named
from ptq_cli.run.repack import RepackSettings, plan_repack, run_repack
from ptq_cli.storage.folder import open_quantized


def prepare_repack(
    path: Path,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any],
    output: AnyPath | None,
    runtime: str | None,
) -> Job:
    """Plan a repacking: the codes stay, so bits, zeros and methods cannot be chosen."""
    known = {field.name for field in dataclasses.fields(RepackSettings)}
    own = {**recipe, **{key: value for key, value in given.items() if value not in (None, ())}}
    other = sorted(own.keys() - known)
    if other:
        words = ", ".join("--" + key.replace("_", "-") for key in other)
        raise InputError(
            f"{path}: quantized already, so its codes stay as they are: {words} has no effect",
            hint="start from the float model",
        )
    settings = RepackSettings(**{key: own[key] for key in known & own.keys()})
    folder = open_quantized(path)
    stem = path.resolve().name.removesuffix(".gguf").removesuffix(".safetensors")
    target = Path(f"{stem}-{settings.format}") if output is None else Path(output)

    def job(*, trial: bool) -> Job:
        repack = plan_repack(folder, format_named(settings.format), settings, trial=trial)
        plan = with_warnings(repack.plan, folder.checkpoint, None, runtime)
        repack = dataclasses.replace(repack, plan=plan)
        start = partial(run_repack, repack, fingerprints(folder.checkpoint, None))
        look, identity = partial(estimate_repack, repack), {"command": "repack"}
        return Job("pack", plan, folder.checkpoint, None, target, identity, start, look)

    glance = job(trial=False)
    return glance if glance.target().complete() else job(trial=True)
