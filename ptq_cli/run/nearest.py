"""Plain rounding to nearest of a layer, measured and packed; and the proof that what was packed
unpacks to the same.

Every method is compared with it, and it is all that `ptq rtn --no-mse` does, at the speed of the
memory: a few rows at a time go from the file to the packed bytes while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil

import numpy as np

from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.core.statistics import Drift, SiteStatistics
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError, stated_in
from ptq_cli.numerics.activations import calibrated_scale, rounded_inputs
from ptq_cli.numerics.output_errors import (
    Inputs,
    Measures,
    Piece,
    Rows,
    error_with_rounded_inputs,
    measure,
    measure_rows,
)
from ptq_cli.numerics.parallel import pieces
from ptq_cli.numerics.rounding import blank, round_rows, round_to_nearest
from ptq_cli.numerics.scales import (
    ScaleMisfit,
    check_lone_scale,
    first_small_scale,
    global_scale_of,
    too_small,
)

MEASURED_TOKENS = 128  # of those that were calibrated on, at most


def round_layer(
    weight: Rows,
    layer: Layer,
    fmt: Format,
    statistics: SiteStatistics | None,
    outputs: FloatArray | None = None,
) -> tuple[dict[str, Array], Measures]:
    """The layer plainly rounded to nearest: the format's tensors, and its errors.

    outputs: [out_features], what the outputs are multiplied by before they are measured, or None

    Raises:
        ScaleMisfit: a scale is too large or too small for its dtype.
    """
    inputs = inputs_of(statistics)
    scale = input_scale(layer, statistics)
    layer = with_global_scale(layer, fmt, lambda: absmax_of(weight))
    with misfits_of(layer):
        if not layer.grid.by_rows:
            plain, measures = round_to_nearest(weight[:], layer.grid), None
        elif fmt.by_rows(layer):
            tensors, measures = _row_by_row(weight, layer, fmt, inputs, outputs)
            if layer.activation is None or statistics is None:
                return tensors, measures
            unpacked = fmt.decode(layer, tensors)
            return tensors, as_run(measures, weight, layer, unpacked, statistics, outputs)
        else:
            plain = blank(layer.shape, layer.grid)
            measures = _measured(weight, inputs, outputs, plain.panel)
        _refuse_small_scales(weight, plain)
        tensors, unpacked = as_stored(layer, replace(plain, input_scale=scale), fmt)
        if measures is None or unpacked.offsets is not None:  # offsets decode to something else
            measures = measure(weight[:], unpacked, inputs, outputs)
        return tensors, as_run(measures, weight, layer, unpacked, statistics, outputs)


def as_run(
    measures: Measures,
    weight: Rows,
    layer: Layer,
    rounded: QuantizedWeight,
    statistics: SiteStatistics | None,
    outputs: FloatArray | None = None,
) -> Measures:
    """The measures of a weight alone, made those of the layer as it runs: where its inputs are
    rounded, too, errors are those of the outputs with rounded inputs. On held-out inputs, and on
    the sample of those that were calibrated on."""
    activation = layer.activation
    if activation is None or statistics is None:
        return measures

    def error(inputs: Array, drift: Drift | None) -> float:
        values = inputs.astype(np.float32, copy=False)
        seen = rounded_inputs(values, activation, rounded.input_scale, rounded.input_zero)
        wanted = values if drift is None else drift.heldout
        stream = None if drift is None else drift.heldout_stream
        return error_with_rounded_inputs(weight, rounded, wanted, seen, outputs, stream)

    held = statistics.heldout
    return replace(
        measures,
        rel_err=error(statistics.sample if len(statistics.sample) else held, None),
        heldout_rel_err=error(held, statistics.drift) if len(held) else None,
        weight_rel_err=measures.error,
    )


def with_global_scale(
    layer: Layer, fmt: Format, absmax: Callable[[], float], power_of_two: bool = False
) -> Layer:
    """The layer, the global scale of its E4M3 scales known where the format holds one.

    absmax: gives the greatest weight by size of the layer, or of all that share the scale

    Raises:
        ScaleMisfit: the format holds none, and the layer's scales do not fit E4M3 by themselves.
    """
    grid = layer.grid
    if grid.scale_dtype != "e4m3" or (fmt.global_scale and grid.global_scale):
        return layer
    assert grid.small_float is not None
    if not fmt.global_scale:
        with misfits_of(layer):
            check_lone_scale(absmax() / grid.small_float.largest)
        return layer
    found = global_scale_of(absmax(), grid.small_float, power_of_two)
    return replace(layer, grid=replace(grid, global_scale=found))


def absmax_of(weight: Rows) -> float:
    """The greatest weight by size."""
    parts = pieces(0, weight.shape[0], weight.shape[1])
    return max((float(np.abs(weight[rows]).max(initial=0)) for rows in parts), default=0.0)


@contextmanager
def misfits_of(layer: Layer) -> Iterator[None]:
    """Let scales that do not fit say whose they are."""
    try:
        with stated_in(f"tensor {layer.tensor!r} {list(layer.full_shape)}"):
            yield
    except ScaleMisfit as error:
        error.module = layer.module
        raise


def _refuse_small_scales(weight: Rows, rounded: QuantizedWeight, top: int = 0) -> None:
    """Raises ScaleMisfit. rounded: of rows from `top` on"""
    found = first_small_scale(rounded)
    if found is None:
        return
    (row, group), grid = found, rounded.grid
    if grid.group_size == 0:
        raise ScaleMisfit(too_small(weight[:], grid))
    own = weight[top + row : top + row + 1][:, grid.g_idx(weight.shape[1]) == group]
    raise ScaleMisfit(f"row {top + row}: {too_small(own, grid)}")


def inputs_of(statistics: SiteStatistics | None, *, exact: bool = False) -> Inputs:
    """What errors of a layer are measured on: inputs that were held out, and some that were
    calibrated on, or (`exact`, or where none of them is known) their Hessian."""
    if statistics is None:
        return Inputs()
    sample = None if exact or not len(statistics.sample) else statistics.sample
    if sample is not None and len(statistics.heldout):  # which then decide
        sample = sample[:: ceil(len(sample) / MEASURED_TOKENS)]
    return Inputs(statistics.hessian, sample, statistics.heldout, statistics.drift)


def input_scale(layer: Layer, statistics: SiteStatistics | None) -> float | None:
    """What is known beforehand of the scale of the layer's inputs; None where nothing is."""
    if layer.activation is None or not layer.activation.calibrated:
        return None
    if statistics is None:
        raise InputError(
            "no token reaches it, so nothing tells the scale of its inputs",
            hint="calibrate on more tokens, or --scheme FP8_DYNAMIC or NVFP4A16",
        )
    return calibrated_scale(statistics.absmax, layer.activation)


def _row_by_row(
    weight: Rows, layer: Layer, fmt: Format, inputs: Inputs, outputs: FloatArray | None
) -> tuple[dict[str, Array], Measures]:
    """For formats whose tensors have the weight's rows: each panel is packed, proven and put into
    its place, and its codes are forgotten."""
    rows, columns = layer.shape
    none = fmt.encode(_panel_of(layer, 0), blank((0, columns), layer.grid))
    tensors = {
        name: np.empty((rows, *values.shape[1:]), values.dtype) for name, values in none.items()
    }

    def begin(panel: slice) -> QuantizedWeight:
        return blank((panel.stop - panel.start, columns), layer.grid)

    def finish(panel: slice, rounded: QuantizedWeight) -> None:
        _refuse_small_scales(weight, rounded, panel.start)
        part, _ = as_stored(_panel_of(layer, len(rounded.codes)), rounded, fmt)
        for name, values in part.items():
            tensors[name][panel] = values

    return tensors, _measured(weight, inputs, outputs, begin, finish)


def _panel_of(layer: Layer, rows: int) -> Layer:
    shape = (rows, layer.shape[1])
    return replace(layer, shape=shape, full_shape=shape)


def _measured(
    weight: Rows,
    inputs: Inputs,
    outputs: FloatArray | None,
    begin: Callable[[slice], QuantizedWeight],
    finish: Callable[[slice, QuantizedWeight], None] = lambda panel, rounded: None,
) -> Measures:
    """Round all rows, measuring on the way.

    begin: gives room for the rows of a panel; finish: takes it, filled
    """

    def work(panel: slice) -> Iterator[Piece]:
        into, columns = begin(panel), weight.shape[1]
        panel_pieces = pieces(panel.start, panel.stop, columns)
        decoded = np.empty((panel_pieces[0].stop - panel.start, columns), np.float32)
        for rows in panel_pieces:
            part = weight[rows]
            error = decoded[: len(part)]
            place = slice(rows.start - panel.start, rows.stop - panel.start)
            round_rows(part, into, place, error)
            yield part, np.subtract(part, error, out=error)
        finish(panel, into)

    return measure_rows(weight.shape, work, inputs, outputs)


def as_stored(
    layer: Layer, rounded: QuantizedWeight, fmt: Format
) -> tuple[dict[str, Array], QuantizedWeight]:
    """The weight, packed, and what it unpacks to.

    Raises:
        InputError: it does not unpack to what was computed.
    """
    tensors = fmt.encode(layer, rounded)
    unpacked = fmt.decode(layer, tensors)
    if not same_weight(unpacked, rounded):
        raise InputError("what was packed does not unpack to the same", hint="report this bug")
    return tensors, unpacked


def same_weight(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether codes, scales, zeros, groups and own offsets of two rounded weights are equal."""
    return (
        a.grid.global_scale == b.grid.global_scale
        and np.array_equal(a.codes, b.codes)
        and np.array_equal(a.scales, b.scales)
        and np.array_equal(a.zeros, b.zeros)
        and np.array_equal(a.column_groups(), b.column_groups())
        and (not a.grid.own_offsets or _equal(a.offsets, b.offsets))
        and _equal(a.super_scales, b.super_scales)
        and _equal(a.super_offsets, b.super_offsets)
    )


def _equal(a: Array | None, b: Array | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)
