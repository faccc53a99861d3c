"""Smoothing commands as jobs: plan, the pass over the sites, then the ordinary run on what it
leaves, or the smoothed float weights themselves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli.calibration.find import BESIDE, AnyPath, SourceSettings, find_source
from ptq_cli.calibration.from_file import CalibrationFile, open_calibration
from ptq_cli.calibration.from_tokens import TokenSource
from ptq_cli.calibration.sites import model_sites
from ptq_cli.calibration.source import StatisticsSource
from ptq_cli.commands.forecast import Forecast
from ptq_cli.commands.forecast_jobs import forecast_smoothing
from ptq_cli.commands.quantize import Job, default_output, with_scheme, with_warnings
from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Plan, Unit
from ptq_cli.core.plugins import Smoother
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.core.report import RunReport
from ptq_cli.errors import InputError
from ptq_cli.models.sites import require_whole
from ptq_cli.numerics.activations import ActivationSettings
from ptq_cli.plan.grid_settings import FLOAT_BITS, GridSettings
from ptq_cli.plan.plan import make_plan
from ptq_cli.plan.settings import make_settings
from ptq_cli.registry import format_named, method, smoother
from ptq_cli.report.earlier import report_of_earlier
from ptq_cli.report.report import as_document, make_report
from ptq_cli.run.calibrate import calibrate_sites
from ptq_cli.run.in_sequence import SmoothedTokens, place_groups
from ptq_cli.run.loop import After, quantization_document, run, staged_bytes
from ptq_cli.run.schedule import ALL_THERE_IS, Resources
from ptq_cli.run.smooth import Smoothed, Smoothing, smooth
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.folded import FOLDS_FILE, stage_folded, write_folds
from ptq_cli.storage.folder import MAX_SHARD, Assembly, write_folder
from ptq_cli.storage.machine import parse_size
from ptq_cli.storage.output import STATISTICS
from ptq_cli.storage.staging import Staging


@dataclasses.dataclass(frozen=True)
class SmoothJob(Job):
    """A smoothing that is planned and ready to run. floats: only float weights are written."""

    smoothing: Smoothing
    floats: bool

    def own(self) -> dict[str, Any]:
        return {"floats": self.floats}

    def forecast(self, **options: Any) -> Forecast:
        """Raises InputError, FileError: what `run` would refuse to begin with."""
        keys = ("max_shard_size", "force", "restart")
        target = self.target(**{key: options[key] for key in keys if key in options})
        rounding = super().forecast(**options)
        return forecast_smoothing(rounding, self.smoothing, self.floats, target)

    def run(
        self,
        *,
        force: bool = False,
        restart: bool = False,
        resources: Resources = ALL_THERE_IS,
        max_shard_size: str | int = MAX_SHARD,
        listen: Listener = nobody,
    ) -> RunReport:
        """Do the work, and give the output its name. Raises PtqError.

        resources: for the rounding; the pass over the sites is one process's work
        """
        target = self.target(max_shard_size, force=force, restart=restart)
        if earlier := report_of_earlier(target):
            return earlier
        begin = time.perf_counter()
        with target.begin() as staging:
            report = self._run(staging, parse_size(str(max_shard_size)), resources, listen)
        seconds = time.perf_counter() - begin
        return dataclasses.replace(report, totals={**report.totals, "seconds": seconds})

    def _run(
        self, staging: Staging, max_shard: int, resources: Resources, listen: Listener
    ) -> RunReport:
        rounded = partial(
            run,
            staging=staging,
            command=self.command,
            inputs=self.inputs,
            listen=listen,
            resources=resources,
            max_shard=max_shard,
        )
        tokens = self.source.statistics
        if isinstance(tokens, TokenSource) and tokens.feedback:
            stream = SmoothedTokens(self.smoothing, tokens, staging)
            return rounded(
                self.plan,
                stream.checkpoint,
                stream,
                after=lambda: self._end(stream.finish(), staging),
                later={tensor for site in self.smoothing.sites for tensor in site.tensors},
            )
        staged = 0 if self.floats else staged_bytes(self.plan, resources)
        staging.check_space(staged, self._bytes_after())
        plan, smoothed = self._pass(staging, resources, listen)
        end = self._end(smoothed, staging)
        if self.floats:
            return self._write_floats(end, staging, max_shard, listen)
        checkpoint = end.checkpoint or self.checkpoint
        return rounded(plan, checkpoint, smoothed.source, after=lambda: end)

    def _pass(
        self, staging: Staging, resources: Resources, listen: Listener
    ) -> tuple[Plan, Smoothed]:
        """Smooth every site, before anything is rounded; the plan, now that it is known which
        statistics there are."""
        plan, smoothing = self.plan, self.smoothing
        if isinstance(self.source.statistics, TokenSource):
            statistics = self._calibrated(self.source.statistics, staging, resources, listen)
            smoothing = dataclasses.replace(smoothing, source=statistics)
            units = tuple(_with_tokens(unit, statistics) for unit in plan.units)
            plan = dataclasses.replace(plan, units=units)
        with threadpool_limits(1):
            return plan, smooth(smoothing, staging, listen)

    def _calibrated(
        self, tokens: TokenSource, staging: Staging, resources: Resources, listen: Listener
    ) -> CalibrationFile:
        """Statistics of the float model on its tokens: a file in the work folder."""
        path = staging.folder / STATISTICS
        if not path.exists():
            fingerprint = self.checkpoint.fingerprint
            with Staging(path, {"command": "calibrate"}) as inner:
                calibrate_sites(tokens, fingerprint, tokens.heldout, inner, listen, resources)
        return open_calibration(path)

    def _end(self, smoothed: Smoothed, staging: Staging) -> After:
        return After(
            smoothed.annotate,
            _entries(smoothed),
            lambda out: _keep(smoothed, out),
            self._staged(smoothed, staging),
        )

    def _bytes_after(self) -> int:
        return self.plan.bytes_before if self.floats else self.plan.bytes_after

    def _staged(self, smoothed: Smoothed, staging: Staging) -> Checkpoint:
        """Folded tensors that are not rounded, in their own dtype in the work folder."""
        rounded = set() if self.floats else {layer.tensor for layer in self.plan.layers}
        names = [name for name in smoothed.checkpoint.folds if name not in rounded]
        return stage_folded(smoothed.checkpoint, names, staging)

    def _write_floats(
        self, end: After, staging: Staging, max_shard: int, listen: Listener
    ) -> RunReport:
        checkpoint = end.checkpoint or self.checkpoint
        size = sum(tensor.spec.nbytes for tensor in checkpoint.tensors.values())
        plan = dataclasses.replace(
            self.plan,
            method=self.command,
            settings=(self.smoothing.settings,),  # nothing else was used
            bytes_before=size,
            bytes_after=size,
        )
        report = make_report(self.command, plan, [], 0.0)
        settings = {**report.settings, "bits": FLOAT_BITS}
        report = dataclasses.replace(report, sites=end.sites, settings=settings)
        parts = [(name, [own]) for name, own in checkpoint.tensors.items()]
        documents = {
            "report.json": as_document(report, times=False),
            "quantization.json": quantization_document(plan, report.settings, self.inputs, ()),
        }
        fmt = format_named("ptq")
        assembly = Assembly(parts, {}, (), fmt, documents)
        write_folder(staging.out, assembly, self.checkpoint, max_shard, listen=listen)
        end.write(staging.out)
        staging.publish()
        return report


def _with_tokens(unit: Unit, statistics: StatisticsSource) -> Unit:
    if unit.site is None or unit.site in statistics.sites:
        return unit
    return dataclasses.replace(unit, site=None, nearest="no token reaches it")


def _entries(smoothed: Smoothed) -> tuple[Mapping[str, Any], ...]:
    return tuple(dataclasses.asdict(outcome) for outcome in smoothed.outcomes)


def _keep(smoothed: Smoothed, out: Path) -> None:
    """Leave the factors beside the weights: an evaluation needs them."""
    folds = smoothed.folds
    if folds:
        write_folds(out / FOLDS_FILE, folds)


def smooth_settings(name: str) -> tuple[type[Any], ...]:
    """The settings classes of a smoothing command."""
    return GridSettings, smoother(name).settings, method("gptq").settings


def prepare_smoothing(
    command: str,
    model: AnyPath,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any] = {},
    source: SourceSettings = BESIDE,
    *,
    output: AnyPath | None = None,
    runtime: str | None = None,
) -> SmoothJob:
    """Plan a smoothing: every mistake that can be known is found here.

    command: a smoother's name; given, recipe: settings by name, `given` wins; `bits` may be 16
    """
    how = smoother(command)
    recipe = {**how.defaults, **with_scheme(given, recipe)}
    floats = (given.get("bits") or recipe.get("bits")) == FLOAT_BITS
    if floats:
        given, recipe = {**given, "bits": None}, {**recipe, "bits": how.defaults.get("bits", 4)}
    if "fisher" in (given.get("weight"), recipe.get("weight")):
        raise InputError(
            f"{command} scales the weights that the Fisher information was taken of",
            hint="--weight hessian",
        )
    settings = make_settings(GridSettings, given, recipe)
    if floats and settings.format != "ptq":
        raise InputError(
            f"--bits {FLOAT_BITS} writes float weights, which format {settings.format} does not"
            " hold",
            hint="leave --format out, and quantize what it writes",
        )
    own = make_settings(how.settings, given, recipe)
    rounder = method(own.then)
    rounding = make_settings(rounder.settings, given, recipe)
    checkpoint = open_checkpoint(Path(model))
    if floats:  # nothing is rounded that could feed what comes after it
        source = dataclasses.replace(source, parallel_layers=True)
    inputs = find_source(checkpoint, source, correct=True)
    if inputs.statistics is None:
        raise InputError(
            f"{checkpoint.path}: {command} needs calibration, and there is none",
            hint="--tokens FILE, --calibration FILE or --activations DIR",
        )
    scheme = ActivationSettings(
        getattr(own, "activation_bits", 8), getattr(own, "activation_scheme", "none"),
        static_scale=0.0,
    )  # fmt: skip
    found = model_sites(checkpoint, settings.family, settings.sites)
    require_whole(found.sites)
    _check(command, settings, own, found.sites, str(checkpoint.path), found.notes)
    if isinstance(inputs.statistics, TokenSource) and inputs.statistics.feedback:
        place_groups(found.sites, inputs.statistics)  # refuses what has no sequence
    fmt = format_named(settings.format)
    plan = make_plan(
        checkpoint, rounder, settings, rounding, fmt, inputs.statistics,
        activation=None if floats else _activation(scheme),
    )  # fmt: skip
    _check_static(scheme, plan)
    parts = tuple({type(part): part for part in (settings, own, rounding)}.values())
    plan = dataclasses.replace(
        plan,
        settings=(settings, rounding, *(part for part in parts[1:] if part != rounding)),
    )
    runtime = None if floats else runtime
    plan = with_warnings(plan, checkpoint, inputs, runtime, *found.notes)
    smoothing = Smoothing(
        checkpoint=checkpoint,
        source=inputs.statistics,
        sites=found.sites,
        layers={layer.tensor: layer for layer in plan.layers},
        smoother=how,
        settings=own,
        rounding=(rounder.name, rounding),
        fmt=fmt,
        activations=scheme,
        judged=not (floats and scheme.scheme == "none"),
        compare=_rivals(how, own, rounder.name, rounding, floats),
        stored=floats,
    )
    if output is None:
        output = default_output(checkpoint, command, settings)
        output = output.rsplit("-", 1)[0] if floats else output
    return SmoothJob(plan, checkpoint, inputs, Path(output), command, smoothing, floats)


def _activation(scheme: ActivationSettings) -> Activation | None:
    if scheme.scheme == "none":
        return None
    return Activation(
        scheme.bits, True, scheme.scheme != "static", scheme.scheme != "dynamic-tensor"
    )


def _rivals(how: Smoother, own: Any, rounder: str, rounding: Any, floats: bool) -> dict[str, Any]:
    """Methods to compare on every layer, with their settings."""
    if floats or not getattr(own, "compare", False):
        return {}
    gptq = rounding if rounder == "gptq" else method("gptq").settings()
    return {how.method: own, "gptq": gptq}


def _check_static(scheme: ActivationSettings, plan: Plan) -> None:
    bare = [layer.module for unit in plan.units if unit.site is None for layer in unit.layers]
    if scheme.scheme == "static" and bare:
        raise InputError(
            f"no statistics to take static scales from for {len(bare)} layers:"
            f" {', '.join(bare[:10])}",
            hint="calibrate them, or --activation-scheme dynamic-token",
        )


def _check(
    command: str,
    settings: GridSettings,
    own: Any,
    sites: Sequence[Any],
    path: str,
    notes: Sequence[str],
) -> None:
    """Refuse what cannot work."""
    if not sites:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(
            f"{path}: no sites are known that {command} could work on{why}",
            hint="name them in a recipe: [[sites]]",
        )
    groups = {settings.group_size, *(rule.get("group_size") for rule in settings.layers)}
    if getattr(own, "clip", False) and own.then == "awq" and 0 in groups:
        raise InputError(
            "the clip search cuts the range of a group or row; group_size 0 has one for the tensor",
            hint="--no-clip, or --group-size -1",
        )
