"""What is done with one unit: round its layers, keep the better of the method and plain rounding,
prove that what was packed unpacks to the same, and measure.

Arrays in, tensors and report rows out; files are the runner's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ptq_cli.core.layer import Layer, Unit
from ptq_cli.core.plugins import Format, Method
from ptq_cli.core.report import LayerReport
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import NumericalError, stated_in
from ptq_cli.numerics.output_errors import Measures, measure
from ptq_cli.run.nearest import (
    Rows,
    Stored,
    as_stored,
    input_scale,
    inputs_of,
    round_layer,
)


@dataclass(frozen=True)
class LayerWeight:
    """A layer's weight as it is read.

    importance: what weighs its scale search, of its shape, where that is not the method's business
    outputs: what its outputs are multiplied by before they are measured, [out_features], or None
    """

    rows: Rows
    importance: FloatArray | None = None
    outputs: FloatArray | None = None


class How(Protocol):
    """How a unit is rounded (run/unit_job.py has one that travels)."""

    @property
    def how(self) -> Method: ...

    @property
    def settings(self) -> Any: ...

    @property
    def fmt(self) -> Format: ...

    @property
    def on_failure(self) -> str: ...


@dataclass(frozen=True)
class LayerResult:
    """A finished layer: `layer.method` says what rounded it."""

    layer: Layer
    tensors: dict[str, Array]
    row: LayerReport


@dataclass(frozen=True)
class Chosen:
    """What is written of a layer, and how good it is."""

    stored: Stored
    measures: Measures
    rtn: Measures
    method: str
    fallback: str | None
    damp_percent: float | None
    notes: tuple[str, ...]


def quantize_unit(
    unit: Unit,
    statistics: SiteStatistics | None,
    load: Callable[[Layer], LayerWeight],
    rounding: How,
) -> list[LayerResult]:
    """Quantize the layers of one unit. load: reads the weight of one

    Raises:
        NumericalError: the factorization failed for good.
        InputError: a weight is not finite, or a scale does not fit its dtype.
    """
    begin = time.perf_counter()
    prepared = _prepare(unit, statistics, rounding)
    shared = (time.perf_counter() - begin) / len(unit.layers)
    results = []
    for layer in unit.layers:
        begin = time.perf_counter()
        with stated_in(f"tensor {layer.tensor!r} {list(layer.full_shape)}"):
            chosen = choose(load(layer), layer, statistics, prepared)
            result = _finish(layer, chosen, statistics, prepared.fmt)
        seconds = shared + time.perf_counter() - begin
        results.append(replace(result, row=replace(result.row, seconds=seconds)))
    return results


def _prepare(unit: Unit, statistics: SiteStatistics | None, rounding: How) -> Prepared:
    """What the layers of a unit share, or why they are only rounded to nearest."""
    how, settings, fmt = rounding.how, rounding.settings, rounding.fmt
    failure = unit.nearest
    if failure is None and how.needs_hessian and statistics is not None and _all_dead(statistics):
        failure = "its inputs are all zero"
    shared = None
    if failure is None:
        try:
            shared = how.prepare(statistics, unit.layers[0].grid, settings)
        except NumericalError as error:
            if rounding.on_failure != "rtn":
                raise
            failure = error.message
    return Prepared(how, shared, settings, fmt, failure)


@dataclass(frozen=True)
class Prepared:
    """A method that is ready for the layers of a site.

    shared: what its `prepare` gave; failure: why they are only rounded to nearest, or None
    """

    method: Method
    shared: Any
    settings: Any
    fmt: Format
    failure: str | None = None


def choose(
    given: LayerWeight,
    layer: Layer,
    statistics: SiteStatistics | None,
    prepared: Prepared,
) -> Chosen:
    """The better of the method and plain rounding to nearest: on held-out inputs where there are
    any, else on the Hessian, else on the weight itself. What is measured is what the format's
    tensors unpack to."""
    method, fmt, settings = prepared.method, prepared.fmt, prepared.settings
    plain, rtn = round_layer(given.rows, layer, fmt, statistics, given.outputs)
    if prepared.failure is not None or method.is_nearest(settings):
        return Chosen(plain, rtn, rtn, "rtn", prepared.failure, None, ())
    weight = given.rows[:]
    result = method.apply(weight, prepared.shared, layer.grid, settings, given.importance)
    scale = input_scale(layer, statistics)
    stored = as_stored(layer, replace(result.weight, input_scale=scale), fmt)
    known = inputs_of(statistics)
    measures = measure(weight, stored.unpacked(), outputs=given.outputs, **known)
    if error_of(measures) <= error_of(rtn):
        name = method.name
        return Chosen(stored, measures, rtn, name, None, result.damp_percent, result.notes)
    if method.searches_ranges:
        note = "the whole range of each group is better than the searched one"
        notes = (*result.notes, note)
        return Chosen(plain, rtn, rtn, "rtn", None, result.damp_percent, notes)
    where = "held-out inputs" if rtn.heldout_rel_err is not None else "the calibration inputs"
    why = f"rtn is better on {where}"
    return Chosen(plain, rtn, rtn, "rtn", why, result.damp_percent, result.notes)


def error_of(measures: Measures) -> float:
    """The error that counts: on held-out inputs where there are any."""
    return measures.rel_err if measures.heldout_rel_err is None else measures.heldout_rel_err


def _finish(
    layer: Layer, chosen: Chosen, statistics: SiteStatistics | None, fmt: Format
) -> LayerResult:
    layer = replace(layer, method=chosen.method)
    row = LayerReport(
        sym=layer.grid.sym,
        method=chosen.method,
        calibrated=statistics is not None,
        tokens=0 if statistics is None else statistics.n_tokens,
        dead_columns=dead_columns(statistics),
        damp_percent=chosen.damp_percent,
        fallback=chosen.fallback,
        seconds=0.0,
        notes=(*chosen.notes, *_few(statistics)),
        **layer_columns(layer, fmt),
        **error_columns(chosen.measures, chosen.rtn),
    )
    return LayerResult(layer, chosen.stored.tensors, row)


def _few(statistics: SiteStatistics | None) -> tuple[str, ...]:
    """A note where a site saw fewer tokens than it has columns (an expert seldom chosen, say)."""
    if statistics is None or statistics.n_tokens >= statistics.in_features:
        return ()
    tokens, columns = statistics.n_tokens, statistics.in_features
    return (f"calibrated on {tokens} tokens, fewer than its {columns} columns",)


def _all_dead(statistics: SiteStatistics) -> bool:
    return dead_columns(statistics) == statistics.in_features


def dead_columns(statistics: SiteStatistics | None) -> int:
    """Columns whose input was always zero."""
    return 0 if statistics is None else int((statistics.hessian.diagonal() == 0).sum())


def layer_columns(layer: Layer, fmt: Format) -> dict[str, Any]:
    """The columns of the report that say which layer it is, and what it weighs."""
    size = sum(spec.nbytes for spec in fmt.specs(layer))
    return {
        "layer": layer.tensor,
        "module": layer.module,
        "shape": layer.full_shape,
        "bits": layer.grid.bits,
        "group_size": layer.grid.group_size,
        "bytes": size,
        "bits_per_weight": 8 * size / layer.size,
    }


def error_columns(measures: Measures, rtn: Measures) -> dict[str, Any]:
    """The columns of the report that say how wrong the result is."""
    ours, plain = error_of(measures), error_of(rtn)
    gain = plain / ours if ours > 0 else (1.0 if plain == 0 else None)
    return {
        "loss": measures.loss,
        "rel_err": measures.rel_err,
        "heldout_rel_err": measures.heldout_rel_err,
        "rtn_rel_err": rtn.rel_err,
        "rtn_heldout_rel_err": rtn.heldout_rel_err,
        "gain_vs_rtn": gain,
        "sqnr_db": measures.sqnr_db,
        "max_abs_err": measures.max_abs_err,
    }
