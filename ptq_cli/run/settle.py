"""The factors of one group of connected sites: searched, tried, kept where they pay.

Factors stay only where, on inputs that no search has seen, the layers they touch come out better
than without; what a fold does to the float model's function is measured on the calibration inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Source
from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Smoother, SmoothingCase
from ptq_cli.core.report import LayerReport
from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError
from ptq_cli.models.folding import inputs_after, settle_factors
from ptq_cli.models.sites import Site, SiteLinear
from ptq_cli.numerics.output_errors import Measures
from ptq_cli.numerics.scales import ScaleMisfit
from ptq_cli.numerics.smoothquant import function_change
from ptq_cli.report.report import row_error
from ptq_cli.run.nearest import round_layer
from ptq_cli.run.quantize_unit import LayerWeight, Prepared, Rounding, choose
from ptq_cli.run.site_inputs import Fold, SiteInputs
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.folded import folded_checkpoint

TRIES = 4  # proposals of a search that are tried before a site is left alone

# Relative change of a site's float outputs that folding may cause, by the dtype of its tensors:
# the rounding of the norm's gain and of stored weights, a few units in the last place.
TOLERANCE = {"F64": 1e-6, "F32": 1e-5, "F16": 4e-3, "BF16": 3e-2}


@dataclass(frozen=True)
class Smoothing:
    """The stage before rounding: how factors are found and judged.

    sites: that may take factors
    layers: those that will be rounded, by tensor, with how their inputs are rounded when they run;
        rounding: what will round them
    judged: whether factors have to prove themselves (not where nothing will be rounded)
    compare: further methods to try on every layer, with their settings
    stored: whether weights are written in the checkpoint's dtype, not rounded to a grid
    """

    checkpoint: Checkpoint
    sites: tuple[Site, ...]
    layers: Mapping[str, Layer]
    smoother: Smoother
    settings: Any
    rounding: Rounding
    judged: bool = True
    compare: Mapping[str, Any] = field(default_factory=dict)
    stored: bool = False

    @property
    def tensors(self) -> set[str]:
        """What a fold may change."""
        fed = (site for site in self.sites if site.feeder is not None)
        return {tensor for site in fed for tensor in site.tensors}


def site_memory(job: Smoothing, site: Site) -> int:
    """Bytes that the work on one site takes: its weights as they were, folded and rounded, what
    rounds them, and a few matrices of the size of its Hessian."""
    how, tensors = job.rounding.how, [linear.tensor for linear in site.linears]
    layers = [job.layers[tensor] for tensor in tensors if tensor in job.layers]
    most = max((how.memory(layer.shape, layer.grid, False) for layer in layers), default=0)
    weights = sum(prod(job.checkpoint.tensors[tensor].spec.shape) for tensor in tensors)
    return most + 12 * weights + 16 * site.in_features**2


@dataclass(frozen=True)
class SiteOutcome:
    """What became of a site.

    fed_by: the tensor that took the factors; None where they were not folded, for `reason`
    strength: alpha, or AWQ's ratio; error, plain_error: mean relative output error of its layers
        rounded, with and without factors, on held-out inputs
    function_change: of the float outputs, relative, by the fold
    """

    site: str
    linears: tuple[str, ...]
    fed_by: str | None = None
    strength: float | None = None
    error: float | None = None
    plain_error: float | None = None
    function_change: float | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()


class Group:
    """The work on one group of sites: `folds` holds what has been decided so far."""

    def __init__(self, job: Smoothing, sites: Sequence[Site], source: Source) -> None:
        self.job, self.sites, self.source = job, sites, source
        self.folds: list[Fold] = []
        self.inputs = SiteInputs(source)
        self._prepared: tuple[Any, Prepared] = (None, Prepared(None, None))
        self.rtn: dict[str, Measures] = {}

    def settle(self) -> dict[str, Any]:
        """Find the factors; what there is to say about the group, as JSON."""
        fmt = self.job.rounding.fmt
        for site, linear in self._linears():
            layer = self.job.layers[linear.tensor]
            statistics = self.inputs.statistics(site, (), linear)
            _, self.rtn[linear.module] = round_layer(
                self.weight(linear, ()), layer, fmt, statistics
            )
        outcomes = [asdict(self._site(site)) for site in self.sites]
        compared = self._linears() if self.job.compare else []
        return {
            "sites": outcomes,
            "rtn": {module: (x.rel_err, x.heldout_rel_err) for module, x in self.rtn.items()},
            "compared": {linear.module: self._compared(site, linear) for site, linear in compared},
        }

    def _linears(self) -> list[tuple[Site, SiteLinear]]:
        """Those that will be rounded and whose inputs are known, each with its site."""
        return [
            (site, linear)
            for site in self.sites
            for linear in site.linears
            if linear.tensor in self.job.layers and self.inputs.known(linear, site)
        ]

    # ---- what is read, with the folds made so far ----

    def weight(
        self, linear: SiteLinear, folds: Sequence[Fold], stored: bool = False
    ) -> NDArray[np.float32]:
        """float32 [out_features, in_features]. stored: as it is written in its own dtype"""
        checkpoint = folded_checkpoint(self.job.checkpoint, folds)
        if stored:
            values = checkpoint.read(linear.tensor).astype(np.float32)
        else:
            shape = checkpoint.tensors[linear.tensor].spec.shape
            values = checkpoint.matrix(linear.tensor, (shape[0], shape[1]))
        return np.ascontiguousarray(values.T) if linear.transposed else values

    # ---- one site ----

    def _site(self, site: Site) -> SiteOutcome:
        """Search, settle, try, and keep the fold where it pays."""
        outcome = SiteOutcome(site.name, tuple(linear.module for linear in site.linears))
        statistics = self.inputs.statistics(site, ())
        if site.feeder is None or statistics is None:
            return replace(outcome, reason=site.reason or "no statistics of its inputs")
        if statistics.in_features != site.in_features:
            raise InputError(
                f"{self.source.name}: {site.name} has {statistics.in_features} inputs there,"
                f" {site.in_features} in {self.job.checkpoint.path}",
                hint="these statistics belong to another model",
            )
        before = self._errors(site, self.folds)
        weights = tuple(self.weight(linear, self.folds) for linear in site.linears)
        pairs = zip(site.linears, weights, strict=True)
        rounded = tuple(weight for x, weight in pairs if x.tensor in self.job.layers)
        grid, activation = self._numbers(site)
        case = SmoothingCase(rounded or weights, statistics, site.ties, grid, activation)
        choices = self.job.smoother.search(case, self.job.settings)
        outcome = replace(outcome, plain_error=_mean(before), reason="no factors are better")
        feeder = {name: self.job.checkpoint.read(name) for name in site.feeder.tensors}
        for choice in choices[:TRIES]:
            used, notes = settle_factors(site, feeder, choice.factors)
            trial = [*self.folds, (site, used.astype(np.float32))]
            tried = replace(outcome, strength=choice.strength, notes=notes)
            change = self._function_change(site, weights, feeder, trial)
            limit = TOLERANCE[self.job.checkpoint.tensors[site.feeder.weight].spec.dtype]
            if change > limit:
                outcome = replace(tried, reason=f"the fold changes its outputs by {change:.2g}")
                continue
            try:
                after = self._errors(site, trial)
            except ScaleMisfit:
                outcome = replace(tried, reason="its scales do not fit with factors")
                continue
            if self._accepted(before, after):
                self.folds = trial
                return replace(
                    tried,
                    fed_by=site.feeder.weight,
                    error=_mean(after),
                    function_change=change,
                    reason=None,
                )
            outcome = replace(
                tried, reason="rounded, it is no better with factors", error=_mean(after)
            )
        return outcome

    def _numbers(self, site: Site) -> tuple[Grid, Activation | None]:
        """How weights and inputs are rounded while factors are searched. A search needs no global
        scale: what is tried has another one each time."""
        layers = self.job.layers
        own = [layers[x.tensor] for x in site.linears if x.tensor in layers]
        layer = own[0] if own else next(iter(layers.values()))
        scale_dtype = layer.grid.scale_dtype
        known = replace(layer.grid, scale_dtype="float32" if scale_dtype == "e4m3" else scale_dtype)
        return known, layer.activation

    def _function_change(
        self,
        site: Site,
        weights: Sequence[NDArray[np.float32]],
        feeder: Mapping[str, Array],
        trial: Sequence[Fold],
    ) -> float:
        """Of the site's float outputs on calibration inputs, between before and after its fold."""
        statistics = self.inputs.statistics(site, ())
        assert statistics is not None
        inputs = statistics.sample.astype(np.float32)
        checkpoint = folded_checkpoint(self.job.checkpoint, trial)
        folded = {name: checkpoint.read(name) for name in feeder}
        seen = inputs_after(site, feeder, folded, inputs, trial[-1][1])
        after = [self.weight(linear, trial, self.job.stored) for linear in site.linears]
        return function_change(inputs, weights, seen, after)

    # ---- judging ----

    def _errors(self, site: Site, folds: Sequence[Fold]) -> dict[str, float]:
        """Errors of the layers a fold of `site` touches: its own, and the one that feeds it."""
        feeder = None if site.feeder is None else site.feeder.weight
        linears = self._linears()
        touched = [(owner, linear) for owner, linear in linears if owner is site]
        touched += [(owner, linear) for owner, linear in linears if linear.tensor == feeder]
        return {linear.module: self._error(owner, linear, folds) for owner, linear in touched}

    def _error(self, owner: Site, linear: SiteLinear, folds: Sequence[Fold]) -> float:
        """Of the layer as it would be written, with rounded inputs where they are."""
        return row_error(self._rounded(owner, linear, folds, self.job.rounding))

    def _rounded(
        self, owner: Site, linear: SiteLinear, folds: Sequence[Fold], rounding: Rounding
    ) -> LayerReport:
        """What would be told of the layer as it would be written under `folds`."""
        statistics = self.inputs.statistics(owner, folds, linear)
        layer = self.job.layers[linear.tensor]
        own = [factors.tobytes() for site, factors in folds if site is owner]
        key = (owner.name, linear.expert, own, rounding.method, layer.grid.grouping)
        if self._prepared[0] != key:
            shared = rounding.how.prepare(statistics, layer.grid, rounding.settings)
            self._prepared = (key, Prepared(shared, None))
        outputs = folded_checkpoint(self.job.checkpoint, folds).output_scale(layer)
        given = LayerWeight(self.weight(linear, folds), outputs=outputs)
        return choose(given, layer, statistics, rounding, self._prepared[1])[1]

    def _accepted(self, before: Mapping[str, float], after: Mapping[str, float]) -> bool:
        """Better on average; where only weights are rounded, no layer worse than plain rounding,
        the same linear of all experts taken together."""
        if not self.job.judged:
            return True
        if not before or not _mean(after) < _mean(before):
            return False
        if any(layer.activation is not None for layer in self.job.layers.values()):
            return True
        sums: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(2))
        for _, linear in self._linears():
            if (module := linear.module) in after:
                same = module.rpartition(".")[2] if linear.expert else module
                sums[same] += after[module], self.rtn[module].error
        return all(own <= plain for own, plain in sums.values())

    def _compared(self, site: Site, linear: SiteLinear) -> dict[str, float]:
        """The error of every method on a layer, on the weight as it was and as folded."""
        own = self.job.smoother.name
        errors = {"rtn": self.rtn[linear.module].error}
        for name, settings in self.job.compare.items():
            rounding = replace(self.job.rounding, method=name, settings=settings)
            if name != own:
                errors[name] = row_error(self._rounded(site, linear, (), rounding))
            label = name if name == own else f"{own}+{name}"
            errors[label] = row_error(self._rounded(site, linear, self.folds, rounding))
        return errors


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors) if errors else 0.0
