"""What is done with one unit: round its layers, keep the better of the method and plain rounding,
prove that what was packed unpacks to the same, and measure.

Arrays in, tensors and report rows out; files are the runner's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ptq_cli.core.layer import Layer, Unit
from ptq_cli.core.plugins import Format, Method, MethodResult
from ptq_cli.core.report import LayerReport
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import NumericalError, PtqError
from ptq_cli.numerics.output_errors import Measures, measure
from ptq_cli.run.nearest import (
    Rows,
    Stored,
    as_stored,
    input_scale,
    inputs_of,
    round_layer,
)

LoadWeight = Callable[[Layer], Rows]


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
    load: LoadWeight,
    method: Method,
    method_settings: Any,
    fmt: Format,
    *,
    on_failure: str = "error",
    importance: Callable[[Layer], FloatArray | None] = lambda _: None,
    outputs: Callable[[Layer], FloatArray | None] = lambda _: None,
) -> list[LayerResult]:
    """Quantize the layers of one unit.

    importance: what weighs each layer's scale search, where it is not the method's own business
    outputs: what each layer's outputs are multiplied by before they are measured, or None
    on_failure: "rtn" rounds to nearest where the factorization fails for good; "error" raises

    Raises:
        NumericalError: the factorization failed for good.
        InputError: a weight is not finite, or a scale does not fit its dtype.
    """
    prepared: Any = None
    failure = unit.nearest
    begin = time.perf_counter()
    if failure is None and method.needs_hessian and statistics is not None:
        failure = "its inputs are all zero" if _all_dead(statistics) else None
    if failure is None:
        try:
            prepared = method.prepare(statistics, unit.layers[0].grid, method_settings)
        except NumericalError as error:
            if on_failure != "rtn":
                raise
            failure = error.message
    shared = (time.perf_counter() - begin) / len(unit.layers)
    results = []
    for layer in unit.layers:
        begin = time.perf_counter()
        rows = load(layer)
        try:
            rounding = Rounding(
                method, prepared, method_settings, fmt, failure, importance(layer), outputs(layer)
            )
            chosen = choose(rows, layer, statistics, rounding)
            result = _finish(layer, chosen, statistics, fmt)
        except PtqError as error:
            error.message = f"tensor {layer.tensor!r} {list(layer.full_shape)}: {error.message}"
            raise
        seconds = shared + time.perf_counter() - begin
        results.append(replace(result, row=replace(result.row, seconds=seconds)))
    return results


@dataclass(frozen=True)
class Rounding:
    """How a layer is rounded and measured.

    failure: why it is only rounded to nearest, or None
    importance, outputs: of this layer, as in `quantize_unit`
    """

    method: Method
    prepared: Any
    settings: Any
    fmt: Format
    failure: str | None = None
    importance: FloatArray | None = None
    outputs: FloatArray | None = None


def choose(
    rows: Rows,
    layer: Layer,
    statistics: SiteStatistics | None,
    rounding: Rounding,
) -> Chosen:
    """The better of the method and plain rounding to nearest: on held-out inputs where there are
    any, else on the Hessian, else on the weight itself. What is measured is what the format's
    tensors unpack to."""
    grid, method, fmt = layer.grid, rounding.method, rounding.fmt
    plain, rtn = round_layer(rows, layer, fmt, statistics, rounding.outputs)
    if rounding.failure is not None or method.is_nearest(rounding.settings):
        return Chosen(plain, rtn, rtn, "rtn", rounding.failure, None, ())
    weight = rows[:]
    result: MethodResult = method.apply(
        weight, rounding.prepared, grid, rounding.settings, rounding.importance
    )
    scale = input_scale(layer, statistics)
    stored = as_stored(layer, replace(result.weight, input_scale=scale), fmt)
    known = inputs_of(statistics)
    measures = measure(weight, stored.unpacked(), outputs=rounding.outputs, **known)
    if error_of(measures) > error_of(rtn):
        where = "held-out inputs" if rtn.heldout_rel_err is not None else "the calibration inputs"
        fallback = None if method.name == "rtn" else f"rtn is better on {where}"
        note = ("the whole range of each group is better than the searched one",)
        notes = (*result.notes, *(note if method.name == "rtn" else ()))
        return Chosen(plain, rtn, rtn, "rtn", fallback, result.damp_percent, notes)
    return Chosen(stored, measures, rtn, method.name, None, result.damp_percent, result.notes)


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
