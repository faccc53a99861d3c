"""A repacking as a command runs it: settings in, a plan, a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.calibration.find import Source
from ptq_cli.commands.check import runtime_warnings
from ptq_cli.commands.forecast import Forecast
from ptq_cli.commands.forecast_jobs import forecast_repack
from ptq_cli.core.layer import Plan
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.core.report import RunReport
from ptq_cli.errors import InputError
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.settings import settings_fields
from ptq_cli.registry import format_named, method
from ptq_cli.report.earlier import report_of_earlier
from ptq_cli.run.repack import Repack, RepackSettings, plan_repack, run_repack
from ptq_cli.run.schedule import ALL_THERE_IS, Resources
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.folder import MAX_SHARD, companions, open_quantized
from ptq_cli.storage.machine import parse_size
from ptq_cli.storage.target import Target


@dataclasses.dataclass(frozen=True)
class RepackJob:
    """A repacking that is planned and ready to run."""

    repack: Repack
    output: Path

    @property
    def plan(self) -> Plan:
        return self.repack.plan

    @property
    def source(self) -> Source:
        """Codes that stay as they are need no statistics."""
        return Source(None)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.repack.folder.checkpoint

    def memory_warnings(self, resources: Resources) -> list[str]:
        return []

    def target(self, max_shard_size: str | int, *, force: bool, restart: bool) -> Target:
        """Where the run works, and what makes another the same."""
        checkpoint = self.repack.folder.checkpoint
        job = {
            "command": "repack",
            "version": __version__,
            "max_shard_size": parse_size(str(max_shard_size)),
            **dataclasses.asdict(self.plan.settings[0]),
            "model": checkpoint.fingerprint,
            "config": checkpoint.config,
        }
        keep = [*checkpoint.files, checkpoint.weights]
        beside = companions(checkpoint, self.repack.fmt)
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
        layers = self.repack.wanted.values()
        return forecast_repack(self.plan, self.repack.folder.checkpoint, layers, target)

    def run(
        self,
        *,
        force: bool = False,
        restart: bool = False,
        resources: Resources = ALL_THERE_IS,
        max_shard_size: str | int = MAX_SHARD,
        listen: Listener = nobody,
    ) -> RunReport:
        """Do the work, layer by layer, and give the output its name. Raises PtqError."""
        limit = parse_size(str(max_shard_size))
        inputs = {"model": self.checkpoint.fingerprint}
        target = self.target(limit, force=force, restart=restart)
        if earlier := report_of_earlier(target):
            return earlier
        with target.begin() as staging:
            return run_repack(self.repack, staging, inputs=inputs, max_shard=limit, listen=listen)


def prepare_repack(
    path: Path,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any],
    output: str | Path | None,
    runtime: str | None,
) -> RepackJob:
    """Plan a repacking: the codes stay, so bits, zeros and methods cannot be chosen."""
    known = {field.name for field in dataclasses.fields(RepackSettings)}
    run_options = ("output", "force", "restart", "strict", "top", "report_path", "as_json")
    names = {field.name for field, _ in settings_fields(GridSettings, method("rtn").settings)}
    own = {**recipe, **{key: value for key, value in given.items() if value not in (None, ())}}
    own = {key: value for key, value in own.items() if key not in run_options and key in names}
    other = sorted(key for key in own.keys() - known if not (key == "mse" and not own[key]))
    if other:
        words = ", ".join("--" + key.replace("_", "-") for key in other)
        raise InputError(
            f"{path}: quantized already, so its codes stay as they are: {words} has no effect",
            hint="start from the float model",
        )
    settings = RepackSettings(**{key: own[key] for key in known & own.keys()})
    folder = open_quantized(path)
    repack = plan_repack(folder, format_named(settings.format), settings)
    said = runtime_warnings(repack.plan, folder.checkpoint, runtime)
    plan = dataclasses.replace(repack.plan, warnings=(*repack.plan.warnings, *said))
    repack = dataclasses.replace(repack, plan=plan)
    stem = path.resolve().name.removesuffix(".gguf").removesuffix(".safetensors")
    target = Path(f"{stem}-{settings.format}") if output is None else Path(output)
    return RepackJob(repack, target)
