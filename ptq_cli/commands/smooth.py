"""`smoothquant` and `awq` as jobs: a quantization with a smoothing before the rounding, or the
smoothed float weights themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptq_cli.calibration.find import BESIDE, AnyPath, SourceSettings, find_source
from ptq_cli.calibration.sites import model_sites
from ptq_cli.calibration.source import Source
from ptq_cli.commands.estimate import estimate_quantization
from ptq_cli.commands.job import Job, default_output, fingerprints, with_scheme, with_warnings
from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Plan
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Method, Smoother
from ptq_cli.core.settings import make_settings
from ptq_cli.errors import InputError
from ptq_cli.models.detect import Sites
from ptq_cli.models.sites import require_whole
from ptq_cli.numerics.activations import ActivationSettings
from ptq_cli.plan.grid_settings import FLOAT_BITS, GridSettings
from ptq_cli.plan.plan import make_plan
from ptq_cli.plan.unused_options import refuse_unused
from ptq_cli.registry import format_named, method, smoother
from ptq_cli.run.loop import quantize
from ptq_cli.run.settle import Settling
from ptq_cli.run.smooth_in_sequence import place_groups
from ptq_cli.run.unit_job import Rounding
from ptq_cli.run.work import Quantization, Smoothing
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.folder import open_float

FLOAT_INPUTS = ActivationSettings(8, "none")


@dataclasses.dataclass(frozen=True)
class FloatOutput:
    """The settings of a run that only smooths: nothing is rounded."""

    bits: int = FLOAT_BITS


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a smoothing command is told. floats: only smoothed float weights are written"""

    how: Smoother
    grid: GridSettings
    own: Any
    rounder: Method
    rounding: Any
    floats: bool

    @property
    def inputs(self) -> ActivationSettings:
        """How inputs are rounded at run time."""
        return self.how.inputs(self.own) or FLOAT_INPUTS

    @property
    def activation(self) -> Activation | None:
        """The same as layers state it."""
        scheme = self.inputs.scheme
        if self.floats or scheme == "none":
            return None
        dynamic, per_token = scheme != "static", scheme != "dynamic-tensor"
        return Activation(self.inputs.bits, True, dynamic, per_token)

    @property
    def rivals(self) -> dict[str, Any]:
        """Methods to compare on every layer, with their settings."""
        if self.floats or not self.how.compares(self.own):
            return {}
        gptq = self.rounding if self.rounder.name == "gptq" else method("gptq").settings()
        return {self.how.method: self.own, "gptq": gptq}


def prepare_smoothing(
    command: str,
    model: AnyPath,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any] = {},
    source: SourceSettings = BESIDE,
    *,
    output: AnyPath | None = None,
    runtime: str | None = None,
) -> Job:
    """Plan a smoothing: every mistake that can be known is found here.

    command: a smoother's name; given, recipe: settings by name, `given` wins; `bits` may be 16
    """
    told = _settings(command, given, recipe)
    checkpoint = open_float(Path(model))
    if told.floats and runtime is not None:
        raise InputError(
            f"--runtime: --bits {FLOAT_BITS} writes float weights, which are checked"
            " once they are quantized"
        )
    if told.floats:  # nothing is rounded that could feed what comes after it
        source = dataclasses.replace(source, parallel_layers=True)
    source = dataclasses.replace(source, required=True)
    found = find_source(checkpoint, source, correct=True)
    sites = model_sites(checkpoint, told.grid.family, told.grid.sites)
    _check(command, told, sites, str(checkpoint.path))
    rounded = _rounded(told, checkpoint, found, sites)
    read = (told.grid, told.rounding, told.own)
    in_sequence = source.in_sequence
    refuse_unused(command, given, recipe, read, calibration=True, in_sequence=in_sequence)
    plan = _float_plan(command, told, rounded) if told.floats else _own_settings(told, rounded)
    plan = with_warnings(plan, checkpoint, found, runtime, *sites.notes)
    work = Quantization(
        command=command,
        plan=plan,
        checkpoint=checkpoint,
        source=found,
        rounding=Rounding(told.rounder.name, told.rounding, told.grid.format),
        inputs=fingerprints(checkpoint, found),
        smoothing=Smoothing(_settling(told, checkpoint, rounded), sites.sites),
    )
    if output is None:
        output = default_output(checkpoint, command, told.grid)
        output = output.rsplit("-", 1)[0] if told.floats else output
    parts = (told.grid, told.rounding) if told.floats else ()
    identity = {type(part).__name__: dataclasses.asdict(part) for part in parts}
    start, look = partial(quantize, work), partial(estimate_quantization, work)
    return Job(command, plan, checkpoint, found, Path(output), identity, start, look)


def _settings(command: str, given: Mapping[str, Any], recipe: Mapping[str, Any]) -> _Settings:
    how = smoother(command)
    defaults, recipe = dict(how.defaults), with_scheme(given, recipe)
    if not (recipe.get("sym", True) if given.get("sym") is None else given["sym"]):
        defaults.pop("narrow_range", None)  # which is of symmetric codes only
    recipe = {**defaults, **recipe}
    floats = (given.get("bits") or recipe.get("bits")) == FLOAT_BITS
    if floats:
        given, recipe = {**given, "bits": None}, {**recipe, "bits": how.defaults.get("bits", 4)}
    if "fisher" in (given.get("weight"), recipe.get("weight")):
        raise InputError(
            f"{command} scales the weights that the Fisher information was taken of",
            hint="--weight hessian",
        )
    grid = make_settings(GridSettings, given, recipe)
    if floats and grid.format != "ptq":
        raise InputError(
            f"--bits {FLOAT_BITS} writes float weights, which format {grid.format} does not hold",
            hint="leave --format out, and quantize what it writes",
        )
    own = make_settings(how.settings, given, recipe)
    rounder = method(own.then)
    rounding = make_settings(rounder.settings, given, recipe)
    return _Settings(how, grid, own, rounder, rounding, floats)


def _rounded(told: _Settings, checkpoint: Checkpoint, source: Source | None, sites: Sites) -> Plan:
    """The plan of the rounding after the smoothing."""
    if source is not None and source.feedback:
        place_groups(sites.sites, source.places)  # refuses what has no sequence
    plan = make_plan(
        checkpoint,
        told.rounder,
        told.grid,
        told.rounding,
        format_named(told.grid.format),
        source,
        activation=told.activation,
    )
    _check_static(told.inputs, plan)
    return plan


def _own_settings(told: _Settings, plan: Plan) -> Plan:
    """The plan with the smoother's settings among its own, each class once."""
    parts = {type(part): part for part in (told.grid, told.rounding, told.own)}
    return dataclasses.replace(plan, settings=tuple(parts.values()))


def _float_plan(command: str, told: _Settings, plan: Plan) -> Plan:
    """The plan where nothing is rounded: every tensor is copied as it is smoothed."""
    return dataclasses.replace(
        plan,
        method=command,
        settings=(told.own, FloatOutput()),  # nothing else is used
        units=(),
        bytes_after=plan.bytes_before,
    )


def _settling(told: _Settings, checkpoint: Checkpoint, plan: Plan) -> Settling:
    return Settling(
        checkpoint=checkpoint,
        layers={layer.tensor: layer for layer in plan.layers},
        smoother=told.how,
        settings=told.own,
        rounding=(told.rounder.name, told.rounding),
        fmt=format_named(told.grid.format),
        activations=told.inputs,
        judged=not (told.floats and told.inputs.scheme == "none"),
        compare=told.rivals,
        stored=told.floats,
    )


def _check(command: str, told: _Settings, sites: Sites, path: str) -> None:
    """Refuse what cannot work."""
    require_whole(sites.sites)
    if not sites.sites:
        why = f" ({'; '.join(sites.notes)})" if sites.notes else ""
        raise InputError(
            f"{path}: no sites are known that {command} could work on{why}",
            hint="name them in a recipe: [[sites]]",
        )
    groups = {rule["group_size"] for rule in told.grid.layers if "group_size" in rule}
    told.how.check(told.own, {told.grid.group_size, *groups})


def _check_static(inputs: ActivationSettings, plan: Plan) -> None:
    bare = [layer.module for unit in plan.units if unit.site is None for layer in unit.layers]
    if inputs.scheme == "static" and bare:
        raise InputError(
            f"no statistics to take static scales from for {len(bare)} layers: {fold_names(bare)}",
            hint="calibrate them, or --activation-scheme dynamic-token",
        )
