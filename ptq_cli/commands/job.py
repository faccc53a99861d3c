"""A quantizing command, planned and ready to run: what all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.calibration.find import AnyPath
from ptq_cli.calibration.source import Source
from ptq_cli.commands.check import runtime_warnings
from ptq_cli.commands.estimate import Estimate, estimate_quantization
from ptq_cli.core.layer import Plan
from ptq_cli.core.names import fold_names
from ptq_cli.core.report import RunReport
from ptq_cli.errors import InputError
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.left_dense import dense_warnings
from ptq_cli.plan.mixes import is_mix, mix_name
from ptq_cli.plan.schemes import SCHEMES, check_alone, scheme_settings
from ptq_cli.registry import format_named
from ptq_cli.report.report import report_from_document
from ptq_cli.run.loop import quantize
from ptq_cli.run.output import weights_bytes
from ptq_cli.run.schedule import Resources, RunOptions, take_resources
from ptq_cli.run.work import Quantization
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.companions import GGUF_SUFFIX, companions
from ptq_cli.storage.files import without_constants
from ptq_cli.storage.folder import container_of
from ptq_cli.storage.machine import parse_size
from ptq_cli.storage.made import most_said
from ptq_cli.storage.output import Target
from ptq_cli.storage.reports import read_report
from ptq_cli.storage.staging import Staging

DEFAULTS = RunOptions()


@dataclasses.dataclass(frozen=True)
class Job:
    """identity: what makes two runs the same, besides the plan's settings and the inputs
    start: does the work; look: what it would take; weigh: bytes of the weights files
    """

    command: str
    plan: Plan
    checkpoint: Checkpoint
    source: Source | None
    output: Path
    identity: Mapping[str, Any]
    start: Callable[[Staging, RunOptions], RunReport]
    look: Callable[[Target, Resources], Estimate]
    weigh: Callable[[int | None, Mapping[str, Any]], int] | None = None

    def target(self, options: RunOptions = DEFAULTS) -> Target:
        """Where the run works, and what makes another the same."""
        fmt = format_named(self.plan.format)
        job = {
            "command": self.command,
            "version": __version__,
            "max_shard_size": options.max_shard or container_of(fmt).max_shard,
            **self.identity,
        }
        for part in self.plan.settings:
            job |= dataclasses.asdict(part)
        job |= fingerprints(self.checkpoint, self.source)
        job["config"] = without_constants(self.checkpoint.config)
        if self.checkpoint.gguf is not None:
            job["metadata"] = self.checkpoint.gguf.digest
        keep = [*self.checkpoint.files, self.checkpoint.weights]
        if self.source is not None:
            keep += self.source.files
        alone = names_a_file(self.output)
        if alone and options.max_shard is not None:
            hint = "name a folder with -o, which then holds several"
            raise InputError(f"{self.output}: one file, but --max-shard-size is given", hint=hint)
        beside = {} if alone else companions(self.checkpoint, fmt).files
        return Target(self.output, job, options.force, options.restart, keep, beside, alone)

    def run(self, options: RunOptions = DEFAULTS) -> RunReport:
        """Do the work, and give the output its name, unless the same run has. Raises PtqError."""
        target = self.target(options)
        if target.finished():
            report = report_from_document(read_report(self.output)[0])
            return dataclasses.replace(report, earlier=True)
        with Staging(target) as staging:
            return self.start(staging, options)

    def estimate(self, options: RunOptions = DEFAULTS) -> Estimate:
        """What `run` would do. Raises InputError, FileError: what it would refuse to begin with."""
        return self.look(self.target(options), options.resources)

    def weights_bytes(self, options: RunOptions = DEFAULTS) -> int:
        """That the output's weights files will have, headers and all. (Not of a repacking.)"""
        assert self.weigh is not None
        said = most_said(self.target(options).job) if names_a_file(self.output) else {}
        return self.weigh(options.max_shard, said)

    def memory_warnings(self, resources: Resources) -> list[str]:
        """Units that take more memory than there is. (No part of the report: that depends on
        nothing but what was asked.)"""
        if resources.scheduler is not None:
            return []
        limit = resources.memory
        big = {unit.name: unit.memory for unit in self.plan.units if unit.memory > limit}
        if not big:
            return []
        return [
            f"{len(big)} units need more memory ({max(big.values()) / 1e9:.2f} GB) than the"
            f" {limit / 1e9:.2f} GB allowed; each runs alone: {fold_names(big)}"
        ]


def names_a_file(output: Path) -> bool:
    """Whether an output is the weights file itself, not a folder that holds it."""
    return output.suffix == GGUF_SUFFIX


def check_output_name(output: Path, fmt: str, smoothed: bool = False) -> None:
    """Refuse a GGUF file as the output where it would not be one, or not all."""
    if not names_a_file(output):
        if output.suffix.lower() == GGUF_SUFFIX:
            raise InputError(f"-o {output}: the name of a GGUF file ends with {GGUF_SUFFIX}")
        return
    if container_of(format_named(fmt)).filled:
        raise InputError(f"-o {output} names a GGUF file", hint="--format gguf, or name a folder")
    if smoothed:
        raise InputError(
            f"-o {output} names a file, but the factors of a smoothing go beside the weights",
            hint="name a folder",
        )


def quantization_job(work: Quantization, output: AnyPath, identity: Mapping[str, Any]) -> Job:
    """A planned quantization as a job."""
    start, look = partial(quantize, work), partial(estimate_quantization, work)
    target = Path(output)
    check_output_name(target, work.plan.format, work.smoothing is not None)
    weigh = partial(weights_bytes, work)
    planned = (work.command, work.plan, work.checkpoint, work.source, target, identity)
    return Job(*planned, start, look, weigh)


def take_run_options(options: dict[str, Any]) -> RunOptions:
    """Take what a run is given, the fields of `Resources` among it, out of `options`."""
    names = ("listen", "force", "restart")
    own = {name: options.pop(name) for name in names if name in options}
    size = options.pop("max_shard_size", None)
    max_shard = None if size is None else parse_size(str(size))
    return RunOptions(take_resources(options), max_shard, **own)


def fingerprints(checkpoint: Checkpoint, source: Source | None) -> dict[str, str]:
    """Of what is read."""
    inputs = {"model": checkpoint.fingerprint}
    return inputs if source is None else inputs | {"calibration": " ".join(source.fingerprints)}


def with_warnings(
    plan: Plan, checkpoint: Checkpoint, source: Source | None, runtime: str | None, *more: str
) -> Plan:
    """A plan with the warnings of its source, of what it leaves dense, of what stays behind in the
    model folder, and of what a runtime could not load."""
    odd = () if source is None else source.warnings
    left = (*dense_warnings(plan), *companions(checkpoint, format_named(plan.format)).warnings)
    said, untried = runtime_warnings(plan, checkpoint, runtime)
    noted = (*origin_note(checkpoint), *untried)
    warnings = (*plan.warnings, *left, *odd, *more, *said, *noted)
    return dataclasses.replace(plan, warnings=warnings, untried=noted)


def origin_note(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is to be known of a source that was quantized before."""
    if checkpoint.origin is None:
        return ()
    return (
        f"{checkpoint.path} was quantized before ({checkpoint.origin}): errors are measured against"
        " what it decodes to",
    )


def with_scheme(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with what `scheme` is short for: named on the command line it wins over the recipe's
    own values, named in the recipe the recipe's own values win over it."""
    if given.get("scheme"):
        return {**recipe, **scheme_settings(given["scheme"])}
    return {**scheme_settings(recipe.get("scheme", "")), **recipe}


def check_mix(scheme: str, given: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Refuse settings of a grid beside a mix: options, and those of the recipe that names it."""
    asked = {key: value for key, value in given.items() if value is not None}
    check_alone(scheme, asked if "scheme" in asked else {**recipe, **asked})


def model_stem(checkpoint: Checkpoint) -> str:
    """What files made from a model are called by."""
    stem = checkpoint.stem
    return checkpoint.path.resolve().name or stem if checkpoint.path.is_dir() else stem


def default_output(checkpoint: Checkpoint, command: str, settings: GridSettings) -> str:
    """`<model>-gptq-w4g128`, `<model>-gptq-nvfp4` or `<model>-gptq-Q4_K_M`, in the current
    directory."""
    stem = model_stem(checkpoint)
    if "bits_per_weight" in settings.allocation:
        name = f"{stem}-{command}-{settings.allocation['bits_per_weight']:.2f}bpw"
        return name if settings.format in ("gguf", "ptq") else f"{name}-{settings.format}"
    if is_mix(settings.scheme):
        name = f"{stem}-{command}-{mix_name(settings.scheme)}"
        return name if settings.format == "gguf" else f"{name}-{settings.format}"
    scheme = SCHEMES.get(settings.scheme)
    if scheme is not None and scheme.fixed:
        name = f"{stem}-{command}-{settings.scheme.lower().replace('_', '-')}"
        implied = scheme.settings["format"]
        return name if settings.format == implied else f"{name}-{settings.format}"
    group = {-1: "row", 0: "tensor"}.get(settings.group_size, f"g{settings.group_size}")
    name = f"{stem}-{command}-w{settings.bits}{group}" + ("" if settings.sym else "-asym")
    return name if settings.format == "ptq" else f"{name}-{settings.format}"
