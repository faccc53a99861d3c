"""The factors of one group of connected sites: searched, tried, kept where they pay.

Factors stay only where, on inputs that no search has seen, the layers they touch come out better
than without; what a fold does to the float model's function is measured on the calibration inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Source
from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format, Smoother, SmoothingCase
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError
from ptq_cli.models.folding import inputs_after, settle_factors
from ptq_cli.models.sites import Site, SiteLinear
from ptq_cli.numerics.activations import ActivationSettings, with_static_scale
from ptq_cli.numerics.integer_matmul import linear_w8a8
from ptq_cli.numerics.output_errors import output_errors
from ptq_cli.numerics.smoothquant import function_change
from ptq_cli.numerics.statistics import smoothed
from ptq_cli.registry import method
from ptq_cli.run.nearest import measure_plain
from ptq_cli.run.quantize_unit import Chosen, LayerWeight, Prepared, choose, error_of
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.folded import folded_checkpoint

Fold = tuple[Site, NDArray[np.float32]]

TRIES = 4  # proposals of a search that are tried before a site is left alone

# Relative change of a site's float outputs that folding may cause, by the dtype of its tensors:
# the rounding of the norm's gain and of stored weights, a few units in the last place.
TOLERANCE = {"F64": 1e-6, "F32": 1e-5, "F16": 4e-3, "BF16": 3e-2}


@dataclass(frozen=True)
class Settling:
    """How factors are found and judged.

    layers: those that will be rounded, by tensor; rounding: what will round them (method's name,
        its settings)
    activations: how inputs are rounded at run time; "none": only weights are
    judged: whether factors have to prove themselves (not where nothing will be rounded)
    compare: further methods to try on every layer, with their settings
    stored: whether weights are written in the checkpoint's dtype, not rounded to a grid
    """

    checkpoint: Checkpoint
    layers: Mapping[str, Layer]
    smoother: Smoother
    settings: Any
    rounding: tuple[str, Any]
    fmt: Format
    activations: ActivationSettings
    judged: bool = True
    compare: Mapping[str, Any] = field(default_factory=dict)
    stored: bool = False


def site_memory(job: Settling, site: Site) -> int:
    """Bytes that the work on one site takes: its weights as they were, folded and rounded, what
    rounds them, and a few matrices of the size of its Hessian."""
    how, tensors = method(job.rounding[0]), [linear.tensor for linear in site.linears]
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

    def __init__(self, job: Settling, sites: Sequence[Site], source: Source) -> None:
        self.job, self.sites, self.source = job, sites, source
        self.folds: list[Fold] = []
        self._statistics: dict[str, SiteStatistics] = {}
        self._prepared: tuple[Any, Any] = (None, None)
        self.rtn: dict[str, tuple[float, float | None]] = {}

    def settle(self) -> dict[str, Any]:
        """Find the factors; what there is to say about the group, as JSON."""
        self._baseline()
        outcomes = [self._site(site) for site in self.sites]
        compared = self._compare()
        return {
            "sites": [asdict(outcome) for outcome in outcomes],
            "rtn": self.rtn,
            "compared": compared,
        }

    # ---- what is read, with the folds made so far ----

    def statistics(self, site: Site, folds: Sequence[Fold]) -> SiteStatistics | None:
        """Of the site's inputs behind its own fold, if there is one."""
        if site.name not in self._statistics:
            of_linear = {x: s for s, i in self.source.sites.items() for x in i.linears}
            name = next((of_linear[x.module] for x in site.linears if x.module in of_linear), None)
            if name is None:
                return None
            self._statistics[site.name] = self.source.load(name)
        own = [factors for other, factors in folds if other is site]
        return smoothed(self._statistics[site.name], own[0]) if own else self._statistics[site.name]

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
        statistics = self.statistics(site, ())
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
        case = SmoothingCase(weights, statistics, site.ties, self._grid(site))
        choices = self.job.smoother.search(case, self.job.settings)
        outcome = replace(outcome, plain_error=_mean(before), reason="no factors are better")
        for choice in choices[:TRIES]:
            feeder = {name: self.job.checkpoint.read(name) for name in site.feeder.tensors}
            used, notes = settle_factors(site, feeder, choice.factors)
            trial = [*self.folds, (site, used.astype(np.float32))]
            tried = replace(outcome, strength=choice.strength, notes=notes)
            change = self._function_change(site, weights, trial)
            limit = TOLERANCE[self.job.checkpoint.tensors[site.feeder.weight].spec.dtype]
            if change > limit:
                outcome = replace(tried, reason=f"the fold changes its outputs by {change:.2g}")
                continue
            after = self._errors(site, trial)
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

    def _grid(self, site: Site) -> Grid:
        layers = self.job.layers
        own = [layers[x.tensor].grid for x in site.linears if x.tensor in layers]
        return own[0] if own else next(iter(layers.values())).grid

    def _function_change(
        self, site: Site, weights: Sequence[NDArray[np.float32]], trial: Sequence[Fold]
    ) -> float:
        """Of the site's float outputs on calibration inputs, between before and after its fold."""
        statistics = self._statistics[site.name]
        inputs = statistics.sample.astype(np.float32)
        checkpoint = folded_checkpoint(self.job.checkpoint, trial)
        assert site.feeder is not None
        old = {name: self.job.checkpoint.read(name) for name in site.feeder.tensors}
        new: dict[str, Array] = {name: checkpoint.read(name) for name in site.feeder.tensors}
        seen = inputs_after(site, old, new, inputs, trial[-1][1])
        after = [self.weight(linear, trial, self.job.stored) for linear in site.linears]
        return function_change(inputs, weights, seen, after)

    # ---- judging ----

    def _errors(self, site: Site, folds: Sequence[Fold]) -> dict[str, float]:
        """Errors of the layers a fold of `site` touches: its own, and the one that feeds it."""
        touched = {linear.tensor: (site, linear) for linear in site.linears}
        for other in self.sites:
            for linear in other.linears:
                if site.feeder is not None and linear.tensor == site.feeder.weight:
                    touched[linear.tensor] = (other, linear)
        return {
            linear.module: self._error(owner, linear, folds)
            for owner, linear in touched.values()
            if linear.tensor in self.job.layers and self.statistics(owner, ()) is not None
        }

    def _error(self, owner: Site, linear: SiteLinear, folds: Sequence[Fold]) -> float:
        """Of the layer as it would be written, with integer inputs where they are rounded."""
        chosen, outputs = self._rounded(owner, linear, folds, *self.job.rounding)
        if self.job.activations.scheme == "none":
            return error_of(chosen.measures)
        statistics = self.statistics(owner, folds)
        assert statistics is not None
        inputs = statistics.heldout if len(statistics.heldout) else statistics.sample
        inputs = inputs.astype(np.float32)
        scheme = with_static_scale(self.job.activations, statistics.absmax)
        product = linear_w8a8(inputs, chosen.stored.unpacked(), None, scheme)
        return output_errors(inputs, self.weight(linear, folds), product, outputs).rel_err

    def _rounded(
        self, owner: Site, linear: SiteLinear, folds: Sequence[Fold], name: str, settings: Any
    ) -> tuple[Chosen, Array | None]:
        """The layer as it would be written under `folds`, and the scale of its outputs."""
        statistics = self.statistics(owner, folds)
        layer, how = self.job.layers[linear.tensor], method(name)
        own = [factors.tobytes() for site, factors in folds if site is owner]
        key = (owner.name, own, name, layer.grid)
        if self._prepared[0] != key:
            self._prepared = (key, how.prepare(statistics, layer.grid, settings))
        outputs = folded_checkpoint(self.job.checkpoint, folds).output_scale(layer)
        prepared = Prepared(how, self._prepared[1], settings, self.job.fmt)
        given = LayerWeight(self.weight(linear, folds), outputs=outputs)
        return choose(given, layer, statistics, prepared), outputs

    def _method_error(self, site: Site, linear: SiteLinear, *how: Any) -> float:
        return error_of(self._rounded(site, linear, *how)[0].measures)

    def _baseline(self) -> None:
        """Errors of plain rounding, before anything is folded."""
        for site in self.sites:
            statistics = self.statistics(site, ())
            for linear in site.linears if statistics is not None else ():
                layer = self.job.layers.get(linear.tensor)
                if layer is not None:
                    weight = self.weight(linear, ())
                    plain = measure_plain(weight, layer, statistics, self.job.fmt)
                    self.rtn[linear.module] = (plain.rel_err, plain.heldout_rel_err)

    def _accepted(self, before: Mapping[str, float], after: Mapping[str, float]) -> bool:
        """Better on average; where only weights are rounded, no layer worse than plain rounding."""
        if not self.job.judged:
            return True
        if not before or not _mean(after) < _mean(before):
            return False
        if self.job.activations.scheme != "none":
            return True
        plain = {m: pair[0] if pair[1] is None else pair[1] for m, pair in self.rtn.items()}
        return all(error <= plain[module] for module, error in after.items())

    def _compare(self) -> dict[str, dict[str, float]]:
        """The error of every method on every layer, on the weights as they were and as folded."""
        errors: dict[str, dict[str, float]] = {}
        for site in self.sites if self.job.compare else ():
            for linear in site.linears:
                if linear.tensor in self.job.layers and self.statistics(site, ()) is not None:
                    errors[linear.module] = self._compared(site, linear)
        return errors

    def _compared(self, site: Site, linear: SiteLinear) -> dict[str, float]:
        own = self.job.smoother.name
        result = {}
        for name, settings in self.job.compare.items():
            if name != own:
                result[name] = self._method_error(site, linear, (), name, settings)
            label = name if name == own else f"{own}+{name}"
            result[label] = self._method_error(site, linear, self.folds, name, settings)
        rel, heldout = self.rtn[linear.module]
        return {"rtn": rel if heldout is None else heldout} | result


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors) if errors else 0.0
