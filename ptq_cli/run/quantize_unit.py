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
from ptq_cli.core.plugins import Format, Method
from ptq_cli.core.report import LayerReport
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import NumericalError, stated_in
from ptq_cli.formats.fused import fused_groups
from ptq_cli.models.experts import is_expert
from ptq_cli.numerics.output_errors import Measures, Rows, measure
from ptq_cli.numerics.weak_inputs import weak_inputs
from ptq_cli.plan.units import few_tokens_note
from ptq_cli.registry import format_named, method
from ptq_cli.run.nearest import (
    absmax_of,
    as_run,
    as_stored,
    input_scale,
    inputs_of,
    misfits_of,
    round_layer,
    with_global_scale,
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


@dataclass(frozen=True)
class Rounding:
    """How layers are rounded: a method's name and its settings, a format's name.

    on_failure: "rtn" rounds to nearest where a factorization fails for good; "error" raises
    global_scale: of E4M3 scales, "float32" or "power-of-two"
    """

    method: str
    settings: Any
    format: str
    on_failure: str = "error"
    global_scale: str = "float32"

    @property
    def how(self) -> Method:
        return method(self.method)

    @property
    def fmt(self) -> Format:
        return format_named(self.format)


@dataclass(frozen=True)
class Prepared:
    """What the layers of a unit share, at whatever bits.

    shared: what the method's `prepare` gave
    failure: why they are only rounded to nearest, or None
    """

    shared: Any
    failure: str | None


def quantize_unit(
    unit: Unit,
    statistics: SiteStatistics | None,
    load: Callable[[Layer], LayerWeight],
    rounding: Rounding,
    prepared: Prepared | None = None,
) -> tuple[dict[str, Array], list[LayerReport]]:
    """Quantize the layers of one unit: their tensors, and a row of the report for each.

    load: reads the weight of one
    prepared: what `prepare_unit` made for the unit at other bits, in groups of the same columns

    Raises:
        NumericalError: the factorization failed for good.
        InputError: a weight is not finite, or a scale does not fit its dtype.
    """
    begin = time.perf_counter()
    unit = _with_global_scales(unit, load, rounding)
    prepared = prepared or prepare_unit(unit, statistics, rounding)
    preparing = (time.perf_counter() - begin) / len(unit.layers)
    few = [] if statistics is None else few_tokens_note(statistics)
    weak = None if statistics is None else weak_inputs(statistics) or None
    tensors: dict[str, Array] = {}
    rows = []
    for layer in unit.layers:
        begin = time.perf_counter()
        with stated_in(f"tensor {layer.tensor!r} {list(layer.full_shape)}"):
            own, row = choose(load(layer), layer, statistics, rounding, prepared)
        tensors |= own
        seconds = preparing + time.perf_counter() - begin
        rows.append(replace(row, seconds=seconds, notes=(*row.notes, *few), weak=weak))
    return tensors, rows


def _with_global_scales(
    unit: Unit, load: Callable[[Layer], LayerWeight], rounding: Rounding
) -> Unit:
    """The unit, its E4M3 scales under global ones, which linears that runtimes fuse share."""
    if not rounding.fmt.global_scale:
        return unit
    absmax: dict[str, float] = {}
    every = (*unit.layers, *unit.beside)
    known = {x.module: x for x in every if x.grid.scale_dtype == "e4m3"}
    for modules in fused_groups(known):
        own = [absmax_of(load(known[module]).rows) for module in modules]
        absmax |= dict.fromkeys(modules, max(own))
    power = rounding.global_scale == "power-of-two"
    layers = [
        with_global_scale(x, rounding.fmt, lambda x=x: absmax[x.module], power)  # type: ignore[misc]
        for x in unit.layers
    ]
    return replace(unit, layers=tuple(layers))


def prepare_unit(unit: Unit, statistics: SiteStatistics | None, rounding: Rounding) -> Prepared:
    """What the layers of a unit share. Raises NumericalError: the factorization failed for good."""
    how = rounding.how
    if unit.nearest is not None:
        return Prepared(None, unit.nearest)
    live = statistics is None or _dead_columns(statistics) < statistics.in_features
    if how.needs_hessian and not live:
        return Prepared(None, "its inputs are all zero")
    try:
        return Prepared(how.prepare(statistics, unit.layers[0].grid, rounding.settings), None)
    except NumericalError as error:
        if rounding.on_failure != "rtn":
            raise
        return Prepared(None, error.message)


def choose(
    given: LayerWeight,
    layer: Layer,
    statistics: SiteStatistics | None,
    rounding: Rounding,
    prepared: Prepared,
) -> tuple[dict[str, Array], LayerReport]:
    """The better of the method and plain rounding to nearest: on held-out inputs where there are
    any, else on the Hessian, else on the weight itself. What is measured is what the format's
    tensors unpack to, and they are returned with the layer's row of the report.

    prepared: what the layers of its unit share
    """
    how, fmt, settings = rounding.how, rounding.fmt, rounding.settings
    layer = with_global_scale(layer, fmt, lambda: absmax_of(given.rows))
    plain, rtn = round_layer(given.rows, layer, fmt, statistics, given.outputs)
    nearest = replace(layer_row(layer, fmt, rtn, rtn, statistics), method="rtn")
    if prepared.failure is not None or how.is_nearest(settings):
        return plain, replace(nearest, fallback=prepared.failure)
    weight = given.rows[:]
    scale = input_scale(layer, statistics)
    with misfits_of(layer):
        result = how.apply(weight, prepared.shared, layer.grid, settings, given.importance)
        tensors, unpacked = as_stored(layer, replace(result.weight, input_scale=scale), fmt)
    measures = measure(weight, unpacked, inputs_of(statistics), given.outputs, rtn.energy)
    measures = as_run(measures, weight, layer, unpacked, statistics, given.outputs)
    damp, notes = result.damp_percent, result.notes
    if measures.error <= rtn.error:
        row = layer_row(layer, fmt, measures, rtn, statistics)
        name = "rtn" if how.needs_hessian and statistics is None else how.name
        row = replace(row, method=name, damp_percent=damp, drift=result.drift, notes=notes)
        return tensors, row
    nearest = replace(nearest, damp_percent=damp, notes=notes)
    if how.searches_ranges or (how.needs_hessian and statistics is None):
        note = "the whole range of each group is better than the searched one"
        return plain, replace(nearest, notes=(*notes, note))
    where = "held-out inputs" if rtn.heldout_rel_err is not None else "the calibration inputs"
    return plain, replace(nearest, fallback=f"rtn is better on {where}")


def _dead_columns(statistics: SiteStatistics | None) -> int:
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
        "type": fmt.type_of(layer),
        "group_size": layer.grid.group_size,
        "bytes": size,
        "bits_per_weight": 8 * size / layer.size,
    }


def _tokens_of_expert(layer: Layer, statistics: SiteStatistics | None) -> dict[str, Any]:
    """The columns of the report that say what an expert was calibrated on."""
    if statistics is None or not is_expert(layer.module):
        return {}
    own = statistics.own_tokens
    if own is None:
        return {"own_tokens": statistics.n_tokens, "calibrated_on": "own"}
    return {"own_tokens": own, "calibrated_on": "site"}


def layer_row(
    layer: Layer, fmt: Format, measures: Measures, rtn: Measures, statistics: SiteStatistics | None
) -> LayerReport:
    """A layer's row of the report: what it is, and how wrong the result and plain rounding are."""
    ours, plain = measures.error, rtn.error
    return LayerReport(
        **layer_columns(layer, fmt),
        sym=layer.grid.sym,
        method=layer.method,
        calibrated=statistics is not None,
        loss=measures.loss,
        rel_err=measures.rel_err,
        heldout_rel_err=measures.heldout_rel_err,
        rtn_rel_err=rtn.rel_err,
        rtn_heldout_rel_err=rtn.heldout_rel_err,
        gain_vs_rtn=plain / ours if ours > 0 else (1.0 if plain == 0 else None),
        sqnr_db=measures.sqnr_db,
        max_abs_err=measures.max_abs_err,
        tokens=0 if statistics is None else statistics.n_tokens,
        dead_columns=_dead_columns(statistics),
        damp_percent=None,
        fallback=None,
        seconds=0.0,
        input_bits=None if layer.activation is None else layer.activation.bits,
        levels=None if layer.grid.integers else layer.grid.levels,
        weight_rel_err=measures.weight_rel_err,
        **_tokens_of_expert(layer, statistics),
    )
