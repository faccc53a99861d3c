"""Evaluation from files alone: what a quantized folder decodes to, against the original weights.

Nothing is believed but tensors: errors are measured anew, and so is plain rounding to nearest at
the same grid, to compare with. A layer whose codes are those of plain rounding is named.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ptq_cli.calibration.source import SmoothedSource, Source, smoothed_source
from ptq_cli.core.layer import Layer, Skipped
from ptq_cli.core.names import fold_names
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.core.report import ActivationErrors, LayerReport, OutputErrors, RunReport
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.numerics.activations import ActivationSettings, with_static_scale
from ptq_cli.numerics.integer_matmul import linear_dequantized, linear_w8a8
from ptq_cli.numerics.output_errors import measure, output_errors
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.statistics import HELDOUT_LIMIT
from ptq_cli.plan.units import few_tokens, sites_of
from ptq_cli.report.report import totals
from ptq_cli.run.nearest import inputs_of
from ptq_cli.run.quantize_unit import layer_row
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.experts import fused_again
from ptq_cli.storage.folded import folded_checkpoint, folds_between
from ptq_cli.storage.folder import QuantizedFolder, container_of


@dataclass(frozen=True)
class Sides:
    """The original and what was quantized.

    smoothed: the original with the folds of the quantized folder, which are those of
        `folds_between`
    source, smoothed_source: statistics of the inputs of the original, and of that
    activations: how inputs are rounded to integers too, or None
    """

    original: Checkpoint
    quantized: QuantizedFolder
    smoothed: Checkpoint
    source: Source | None
    smoothed_source: SmoothedSource | None
    activations: ActivationSettings | None = None


def open_sides(
    original: Checkpoint,
    quantized: QuantizedFolder,
    source: Source | None,
    activations: ActivationSettings | None = None,
) -> Sides:
    """Fold the original as the quantized folder says.

    activations: of what has statistics

    Raises:
        InputError: the two do not belong together.
    """
    check_same_model(original, quantized)
    folds = folds_between(original.folder, quantized.checkpoint.folder)
    for site, _ in folds:
        absent = [name for name in site.tensors if name not in original.tensors]
        if absent:
            raise InputError(f"{original.path}: no tensor {absent[0]!r}, which was smoothed")
    smoothed = folded_checkpoint(original, folds)
    behind = None if source is None else smoothed_source(source, folds)
    return Sides(original, quantized, smoothed, source, behind, activations)


def layer_memory(layer: Layer, n_tokens: int) -> int:
    """Bytes that measuring one layer takes, with statistics of so many tokens (0: without)."""
    inputs = 0 if n_tokens == 0 else 8 * layer.shape[1] + 12 * min(HELDOUT_LIMIT, n_tokens)
    return 24 * layer.size + inputs * layer.shape[1]


def evaluate(sides: Sides, listen: Listener = nobody) -> RunReport:
    """Measure every quantized layer.

    Raises:
        InputError: the two do not belong together; the statistics do not fit.
    """
    begin = time.perf_counter()
    original, quantized, source = sides.original, sides.quantized, sides.source
    different, missing = compare_untouched(sides.smoothed, quantized)
    site_of = sites_of(quantized.layers, source)
    rows: list[LayerReport] = []
    loaded: Loaded | None = None
    weights, work = sum(layer.size for layer in quantized.layers.values()), 0
    with threadpool_limits(1):
        for layer in quantized.layers.values():
            site = site_of.get(layer.module)
            if site is None or source is None or sides.smoothed_source is None:
                loaded = None
            elif loaded is None or loaded[0].site != site:
                before = source.load(site)
                loaded = before, sides.smoothed_source.fold(before)
            rows.append(_row(layer, sides, loaded))
            count, total, work = len(rows), len(quantized.layers), work + layer.size
            listen(Progress("measure", count, total, layer.module, work, weights, rows[-1]))
    skipped = tuple(
        Skipped(name, spec.shape, spec.dtype, "different" if name in different else "")
        for name in quantized.untouched()
        for spec in (quantized.checkpoint.tensors[name].spec,)
    )
    bytes_before = sum(tensor.spec.nbytes for tensor in original.tensors.values())
    bytes_after = sum(tensor.spec.nbytes for tensor in quantized.checkpoint.tensors.values())
    return RunReport(
        command="eval",
        rows=tuple(rows),
        skipped=skipped,
        totals=totals(rows, skipped, bytes_before, bytes_after, time.perf_counter() - begin),
        warnings=tuple(_warnings(different, missing, quantized, source, site_of)),
        settings={"format": quantized.fmt.name},
    )


def check_same_model(original: Checkpoint, quantized: QuantizedFolder) -> None:
    """Raises InputError where a layer's tensor is missing in the original, or has another shape."""
    for layer in quantized.layers.values():
        stored = original.tensors.get(layer.tensor)
        if stored is None:
            raise InputError(
                f"{original.path}: no tensor {layer.tensor!r}, which"
                f" {quantized.checkpoint.path} was quantized from"
            )
        if stored.spec.shape != layer.full_shape:
            raise InputError(
                f"{original.path}: tensor {layer.tensor!r} is {list(stored.spec.shape)}, in"
                f" {quantized.checkpoint.path} it is {list(layer.full_shape)}"
            )


def _same_tensor(name: str, original: Checkpoint, quantized: QuantizedFolder) -> bool:
    """Byte for byte, or after the cast that the container made."""
    first, second = original.tensors[name].spec, quantized.checkpoint.tensors[name].spec
    if container_of(quantized.fmt).filled or first.dtype == second.dtype:
        return first == second and np.array_equal(
            original.read_bytes(name), quantized.checkpoint.read_bytes(name)
        )
    ours, theirs = original.read(name), quantized.checkpoint.read(name)
    with np.errstate(over="ignore"):
        return np.array_equal(ours.astype(theirs.dtype), theirs)


def compare_untouched(
    original: Checkpoint, quantized: QuantizedFolder
) -> tuple[list[str], list[str]]:
    """Of the tensors that are no part of a quantized layer: with other bytes than the original,
    and the original's that are missing."""
    taken = {layer.tensor for layer in quantized.layers.values()}
    untouched = sorted(quantized.untouched())
    # experts that came as one tensor of all are there so, or one by one
    original = original.holding(fused_again(original.tensors, untouched))
    different = [
        name
        for name in untouched
        if name not in original.tensors or not _same_tensor(name, original, quantized)
    ]
    return different, sorted(original.tensors.keys() - taken - set(untouched))


Loaded = tuple[SiteStatistics, SiteStatistics]  # of a site: the original's, and behind the folds


def _row(layer: Layer, sides: Sides, loaded: Loaded | None) -> LayerReport:
    begin = time.perf_counter()
    before, statistics = loaded or (None, None)
    weight, rounded = sides.original.weight(layer), sides.quantized.load(layer.module)
    folded, scale = sides.smoothed.weight(layer), sides.smoothed.output_scale(layer)
    sym = layer.grid.sym or is_symmetric(layer, rounded)
    plain = round_to_nearest(weight, replace(layer.grid, sym=sym))
    measures = measure(folded, rounded, outputs=scale, **inputs_of(statistics))
    rtn = measure(weight, plain, **inputs_of(before))
    same = np.array_equal(plain.codes, rounded.codes)
    activations, settings = None, sides.activations
    if settings is not None and before is not None and statistics is not None:
        inputs = _inputs(statistics)
        activations = ActivationErrors(
            settings.scheme,
            _integer_errors(settings, folded, rounded, statistics, scale),
            output_errors(inputs, folded, linear_dequantized(inputs, rounded), scale),
            _integer_errors(settings, weight, plain, before),
        )
    return replace(
        layer_row(layer, sides.quantized.fmt, measures, rtn, statistics),
        sym=sym,
        fallback="codes equal round-to-nearest" if same else None,
        seconds=time.perf_counter() - begin,
        activations=activations,
    )


def is_symmetric(layer: Layer, rounded: QuantizedWeight) -> bool:
    """Some layouts do not say that a grid is symmetric; its zeros do."""
    return bool((rounded.zeros == layer.grid.mid_code).all())


def _integer_errors(
    settings: ActivationSettings,
    weight: FloatArray,
    rounded: QuantizedWeight,
    statistics: SiteStatistics,
    scale: FloatArray | None = None,
) -> OutputErrors:
    """Errors with integer inputs, against the float product."""
    inputs = _inputs(statistics)
    own = with_static_scale(settings, statistics.absmax)
    if own.scheme == "static" and rounded.input_scale is not None:
        own = replace(own, static_scale=rounded.input_scale)
    return output_errors(inputs, weight, linear_w8a8(inputs, rounded, None, own), scale)


def _inputs(statistics: SiteStatistics) -> NDArray[np.float32]:
    """The held-out inputs; the sample where none are held out."""
    inputs = statistics.heldout if len(statistics.heldout) else statistics.sample
    return inputs.astype(np.float32)


def _warnings(
    different: Sequence[str],
    missing: Sequence[str],
    quantized: QuantizedFolder,
    source: Source | None,
    site_of: dict[str, str],
) -> list[str]:
    pairs = (("differ from the original", different), ("of the original are missing", missing))
    warnings = [
        f"{len(names)} unquantized tensors {what}: {fold_names(names)}"
        for what, names in pairs
        if names
    ]
    if source is None:
        warnings.append("no calibration: errors are those of the weights, not of the outputs")
        return warnings
    bare = [module for module in quantized.layers if module not in site_of]
    if bare:
        warnings.append(
            f"{len(bare)} layers have no statistics, their errors are those of the weights:"
            f" {fold_names(bare)}"
        )
    used = [source.sites[site] for site in dict.fromkeys(site_of.values())]
    return warnings + few_tokens(used)
