"""`smoothquant` and `awq` as jobs: a quantization with a smoothing before the rounding, or the
smoothed float weights themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ptq_cli.calibration.find import AnyPath, SourceSettings, find_source
from ptq_cli.calibration.sites import model_sites
from ptq_cli.calibration.source import Source
from ptq_cli.commands import job as jobs
from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Plan
from ptq_cli.core.plugins import Smoother
from ptq_cli.core.settings import make_settings
from ptq_cli.errors import InputError
from ptq_cli.models.detect import Sites
from ptq_cli.models.families import known_types
from ptq_cli.models.sites import Site, require_whole
from ptq_cli.numerics.activations import ActivationSettings
from ptq_cli.plan.grid_settings import FLOAT_BITS, GridSettings
from ptq_cli.plan.mixes import is_mix
from ptq_cli.plan.plan import make_plan
from ptq_cli.plan.schemes import says_inputs, scheme_inputs
from ptq_cli.plan.unused_options import refuse_unused
from ptq_cli.registry import method, smoother
from ptq_cli.run.quantize_unit import Rounding
from ptq_cli.run.settle import Smoothing
from ptq_cli.run.smooth_in_sequence import place_groups
from ptq_cli.run.work import Quantization
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.sources import open_float

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
    rounding: Rounding
    floats: bool

    @property
    def inputs(self) -> ActivationSettings:
        """How inputs are rounded at run time."""
        return self.how.inputs(self.own) or FLOAT_INPUTS

    @property
    def activation(self) -> Activation | None:
        """The same as layers state it, or as the scheme says."""
        if says_inputs(self.grid.scheme):
            return scheme_inputs(self.grid.scheme)
        scheme = self.inputs.scheme
        if scheme == "none":
            return None
        dynamic, per_token = scheme != "static", scheme != "dynamic-tensor"
        return Activation(self.inputs.bits, True, dynamic, per_token)

    @property
    def rivals(self) -> dict[str, Any]:
        """Methods to compare on every layer, with their settings."""
        if self.floats or not self.how.compares(self.own):
            return {}
        chosen = self.rounding.method == "gptq"
        gptq = self.rounding.settings if chosen else method("gptq").settings()
        return {self.how.method: self.own, "gptq": gptq}

    @property
    def needs_hessian(self) -> bool:
        """Whether the search, or a method that rounds, reads whole Hessians."""
        rounders = (self.rounding.how, *map(method, self.rivals))
        return self.how.needs_hessian or any(how.needs_hessian for how in rounders)


def prepare_smoothing(
    command: str,
    model: AnyPath,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any],
    source: SourceSettings,
    output: AnyPath | None,
    runtime: str | None,
) -> jobs.Job:
    """Plan a smoothing; see `prepare`. command: a smoother's name; `bits` may be 16"""
    told = _settings(command, given, recipe)
    checkpoint = open_float(Path(model))
    if told.floats and runtime is not None:
        raise InputError(
            f"--runtime: --bits {FLOAT_BITS} writes float weights, which are checked"
            " once they are quantized"
        )
    _check_cache(command, told, source)
    if told.floats:  # nothing is rounded that could feed what comes after it
        source = dataclasses.replace(source, parallel_layers=True)
    source = dataclasses.replace(source, required=True)
    rounder, how = told.rounding.settings, told.rounding.how
    wanted = {"hessians": told.needs_hessian, "sums_drift": how.corrects_drift(rounder)}
    if source.imatrix is not None:
        raise InputError(f"--imatrix does nothing for {command}, which needs inputs themselves")
    couple = how.couples_rows(rounder)
    found = find_source(checkpoint, source, correct=True, couple=couple, **wanted)
    sites = model_sites(checkpoint, told.grid.family, told.grid.sites)
    _check(command, told, sites, checkpoint.path)
    rounded = _rounded(told, checkpoint, found, sites)
    read = (told.grid, told.rounding.settings, told.own)
    facts = {
        "calibration": True,
        "in_sequence": source.in_sequence,
        "tokens": source.tokens.given,
        "mix": is_mix(told.grid.scheme),
    }
    refuse_unused(command, given, recipe, read, **facts)
    target = jobs.default_output(checkpoint, command, told.grid)
    if told.floats:
        plan = dataclasses.replace(
            rounded,  # every tensor is copied as it is smoothed, and nothing else is used
            method=command,
            settings=(told.own, FloatOutput()),
            units=(),
            bytes_after=rounded.bytes_before,
        )
        target = target.rsplit("-", 1)[0]
        identity = {type(part).__name__: dataclasses.asdict(part) for part in read[:2]}
    else:
        each_class_once = {type(part): part for part in read}
        plan = dataclasses.replace(rounded, settings=tuple(each_class_once.values()))
        identity = {}
    plan = jobs.with_warnings(plan, checkpoint, found, runtime, *sites.notes)
    smoothing = _smoothing(told, checkpoint, sites, rounded)
    inputs = jobs.fingerprints(checkpoint, found)
    work = Quantization(
        command, plan, checkpoint, found, told.rounding, told.grid, inputs, smoothing
    )
    return jobs.quantization_job(work, target if output is None else output, identity)


def _settings(command: str, given: Mapping[str, Any], recipe: Mapping[str, Any]) -> _Settings:
    how, own_recipe = smoother(command), recipe
    defaults, recipe = dict(how.defaults), jobs.with_scheme(given, recipe)
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
    jobs.check_mix(grid.scheme, given, own_recipe)
    if floats and grid.format != "ptq":
        raise InputError(
            f"--bits {FLOAT_BITS} writes float weights, which format {grid.format} does not hold",
            hint="leave --format out, and quantize what it writes",
        )
    own = make_settings(how.settings, given, recipe)
    _check_inputs(grid, given)
    rounder = make_settings(method(own.then).settings, given, recipe)
    rounding = Rounding(own.then, rounder, grid.format, global_scale=grid.global_scale)
    return _Settings(how, grid, own, rounding, floats)


def _check_inputs(grid: GridSettings, given: Mapping[str, Any]) -> None:
    """Refuse options that say how inputs are rounded where the scheme says it."""
    for name in ("activation_scheme", "activation_bits"):
        if says_inputs(grid.scheme) and given.get(name) is not None:
            word = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{grid.scheme} says how inputs are rounded, and so does {word}",
                hint="leave one of them out",
            )


def _check(command: str, told: _Settings, sites: Sites, path: Path) -> None:
    """Refuse what cannot work."""
    require_whole(sites.sites)
    if all(site.certainty != "known" for site in sites.sites):
        why = f" ({'; '.join(sites.notes)})" if sites.notes else ""
        raise InputError(
            f"{path}: no sites are known that {command} could work on{why}",
            hint="ptq inspect --sites writes [[sites]]: check them, say what feeds them, and give"
            f" them with --config; families known: {', '.join(known_types())}",
        )
    groups = {rule["group_size"] for rule in told.grid.layers if "group_size" in rule}
    told.how.check(told.own, {told.grid.group_size, *groups})


def _check_cache(command: str, told: _Settings, source: SourceSettings) -> None:
    """Refuse a rounded cache where the run does not compute what will be cached."""
    if told.grid.kv_cache and told.floats:
        raise InputError(
            f"--kv-cache: --bits {FLOAT_BITS} writes float weights",
            hint="give it where these weights are quantized",
        )
    if told.grid.kv_cache and source.parallel_layers:
        raise InputError(
            f"--kv-cache: {command} changes the values that are cached, so their scales come from"
            " the model as it is smoothed and rounded",
            hint="leave --parallel-layers out",
        )


def _rounded(told: _Settings, checkpoint: Checkpoint, source: Source | None, sites: Sites) -> Plan:
    """The plan of the rounding after the smoothing."""
    rounding = told.rounding
    if source is not None and source.feedback:
        place_groups(sites.sites, source.places)  # refuses what has no sequence
    return make_plan(
        checkpoint,
        rounding.how,
        told.grid,
        rounding.settings,
        rounding.fmt,
        source,
        activation=None if told.floats else told.activation,
    )


def _smoothing(told: _Settings, checkpoint: Checkpoint, sites: Sites, plan: Plan) -> Smoothing:
    layers = {
        layer.tensor: dataclasses.replace(layer, activation=told.activation)
        for layer in plan.layers
    }
    written = set() if told.floats else layers.keys()
    return Smoothing(
        checkpoint=checkpoint,
        sites=tuple(_left_fused(site, checkpoint, written) for site in sites.sites),
        layers=layers,
        smoother=told.how,
        settings=told.own,
        rounding=told.rounding,
        judged=not (told.floats and told.activation is None),
        compare=told.rivals,
        stored=told.floats,
    )


def _left_fused(site: Site, checkpoint: Checkpoint, rounded: Collection[str]) -> Site:
    """The site without a feeder where a fold would change experts that are written as they are
    stored, in one tensor of all."""
    for name in site.tensors if site.feeder is not None else ():
        stored = checkpoint.tensors[name].part_of
        if stored is not None and f"{name.rpartition('.')[0]}.weight" not in rounded:
            reason = f"{stored.spec.name} stays as it is, one tensor of all experts"
            return dataclasses.replace(site, feeder=None, reason=reason)
    return site
