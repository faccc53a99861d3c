"""Quantizations as jobs: settings in, a plan, a report. What every quantizing command shares, and
`gptq`, `rtn` and `pack` themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.calibration.find import BESIDE, AnyPath, Source, SourceSettings, find_source
from ptq_cli.commands.check import runtime_warnings
from ptq_cli.commands.forecast import Forecast
from ptq_cli.commands.forecast_jobs import forecast_plan
from ptq_cli.commands.repack import RepackJob, prepare_repack
from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Plan
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.core.report import RunReport
from ptq_cli.errors import InputError
from ptq_cli.plan.grid_settings import SCHEMES, GridSettings
from ptq_cli.plan.plan import make_plan
from ptq_cli.plan.settings import make_settings
from ptq_cli.registry import format_named, method
from ptq_cli.report.earlier import report_of_earlier
from ptq_cli.run.loop import run
from ptq_cli.run.schedule import ALL_THERE_IS, Resources
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.folder import MAX_SHARD, companions, holds_quantized
from ptq_cli.storage.machine import parse_size
from ptq_cli.storage.target import Target


@dataclasses.dataclass(frozen=True)
class Job:
    """A quantization that is planned and ready to run."""

    plan: Plan
    checkpoint: Checkpoint
    source: Source
    output: Path
    command: str

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what is read."""
        inputs = {"model": self.checkpoint.fingerprint}
        if self.source.fingerprint is not None:
            inputs["calibration"] = self.source.fingerprint
        return inputs

    def own(self) -> dict[str, Any]:
        """What makes two runs the same besides settings and inputs."""
        return {}

    def target(
        self, max_shard_size: str | int = MAX_SHARD, *, force: bool = False, restart: bool = False
    ) -> Target:
        """Where the run works, and what makes another the same."""
        own = {**self.own(), "max_shard_size": parse_size(str(max_shard_size))}
        settings = {
            k: v for part in self.plan.settings for k, v in dataclasses.asdict(part).items()
        }
        read = {**self.inputs, "config": self.checkpoint.config}
        job = {"command": self.command, "version": __version__, **own, **settings, **read}
        keep = [*self.checkpoint.files, self.checkpoint.weights]
        if self.source.statistics is not None:
            keep += self.source.statistics.files
        beside = companions(self.checkpoint, format_named(self.plan.format))
        return Target(self.output, job, force, restart, keep, beside)

    def forecast(
        self,
        *,
        force: bool = False,
        restart: bool = False,
        resources: Resources = ALL_THERE_IS,
        max_shard_size: str | int = MAX_SHARD,
    ) -> Forecast:
        """What `run` would do. Raises InputError, FileError: what it would refuse to begin with."""
        target = self.target(max_shard_size, force=force, restart=restart)
        statistics = self.source.statistics
        return forecast_plan(
            self.command, self.plan, self.checkpoint, statistics, target, resources
        )

    def memory_warnings(self, resources: Resources) -> list[str]:
        """Units that take more memory than there is. (No part of the report: that depends on
        nothing but what was asked.)"""
        if resources.scheduler is not None:
            return []
        limit = resources.memory
        big = [unit for unit in self.plan.units if unit.memory > limit]
        if not big:
            return []
        most = max(unit.memory for unit in big)
        return [
            f"{len(big)} units need more memory ({most / 1e9:.2f} GB) than the"
            f" {limit / 1e9:.2f} GB allowed; each runs alone: {', '.join(u.name for u in big[:10])}"
        ]


@dataclasses.dataclass(frozen=True)
class QuantizeJob(Job):
    """Rounding without a pass before it. on_failure: "error" or "rtn" """

    on_failure: str

    def own(self) -> dict[str, Any]:
        return {"fallback": self.on_failure}

    def run(
        self,
        *,
        force: bool = False,
        restart: bool = False,
        resources: Resources = ALL_THERE_IS,
        max_shard_size: str | int = MAX_SHARD,
        listen: Listener = nobody,
    ) -> RunReport:
        """Do the work, and give the output its name. Raises PtqError."""
        target = self.target(max_shard_size, force=force, restart=restart)
        if earlier := report_of_earlier(target):
            return earlier
        with target.begin() as staging:
            return run(
                self.plan,
                self.checkpoint,
                self.source.statistics,
                staging,
                command=self.command,
                on_failure=self.on_failure,
                inputs=self.inputs,
                listen=listen,
                resources=resources,
                max_shard=parse_size(str(max_shard_size)),
            )


def prepare(
    command: str,
    model: AnyPath,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any] = {},
    source: SourceSettings = BESIDE,
    *,
    output: AnyPath | None = None,
    fallback: str = "error",
    require_calibration: bool = False,
    runtime: str | None = None,
) -> QuantizeJob | RepackJob:
    """Plan a quantization: every mistake that can be known is found here.

    command: "gptq", "rtn", or "pack" (plain rounding to nearest, without calibration)
    given, recipe: settings by name; `given` wins
    runtime: warn of what this runtime could not load (`check`)
    """
    if command == "pack" and holds_quantized(Path(model)):
        return prepare_repack(Path(model), given, recipe, output, runtime)
    chosen = method("rtn" if command == "pack" else command)
    recipe = with_scheme(given, recipe)
    settings = make_settings(GridSettings, given, recipe)
    own = make_settings(chosen.settings, given, recipe)
    checkpoint = open_checkpoint(Path(model))
    found = Source(None)
    if command != "pack":
        found = find_source(checkpoint, source, correct=getattr(own, "drift", 0.0) > 0)
    if require_calibration and found.statistics is None:
        raise InputError(
            f"{checkpoint.path}: no calibration found",
            hint="--tokens FILE, --calibration FILE or --activations DIR",
        )
    plan = make_plan(
        checkpoint,
        chosen,
        settings,
        own,
        format_named(settings.format),
        found.statistics,
        missing=fallback,
        activation=Activation() if settings.scheme == "W8A8" else None,
    )
    plan = with_warnings(plan, checkpoint, found, runtime)
    target = Path(default_output(checkpoint, command, settings)) if output is None else Path(output)
    return QuantizeJob(plan, checkpoint, found, target, command, fallback)


def with_warnings(
    plan: Plan, checkpoint: Checkpoint, source: Source, runtime: str | None, *more: str
) -> Plan:
    """A plan with the warnings of its source, and of what a runtime could not load."""
    said = runtime_warnings(plan, checkpoint, runtime)
    return dataclasses.replace(plan, warnings=(*plan.warnings, *source.warnings, *more, *said))


def with_scheme(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with what `scheme` is short for: named on the command line it wins over the recipe's
    own values, named in the recipe the recipe's own values win over it."""
    if given.get("scheme"):
        return {**recipe, **SCHEMES.get(given["scheme"], {})}
    return {**SCHEMES.get(recipe.get("scheme", ""), {}), **recipe}


def default_output(checkpoint: Checkpoint, command: str, settings: GridSettings) -> str:
    """`<model>-gptq-w4g128`, in the current directory."""
    stem = checkpoint.stem
    if checkpoint.path.is_dir():
        stem = checkpoint.path.resolve().name or stem
    group = {-1: "row", 0: "tensor"}.get(settings.group_size, f"g{settings.group_size}")
    name = f"{stem}-{command}-w{settings.bits}{group}" + ("" if settings.sym else "-asym")
    return name if settings.format == "ptq" else f"{name}-{settings.format}"
