"""Evaluation from files alone: what a quantized folder decodes to, against the original weights.

Nothing is believed but tensors: errors are measured anew, and so is plain rounding to nearest at
the same grid, to compare with. A layer whose codes are those of plain rounding is named.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ptq_cli.calibration.source import Source
from ptq_cli.calibration.streams import through_sites
from ptq_cli.core.layer import Layer, Skipped
from ptq_cli.core.names import fold_names
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.core.report import ActivationErrors, LayerReport, OutputErrors, RunReport
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.evaluation.sides import Sides, compare_untouched
from ptq_cli.models.ties import is_embedding
from ptq_cli.numerics.activations import ActivationSettings, calibrated_scale, with_static_scale
from ptq_cli.numerics.integer_matmul import linear_dequantized, linear_w8a8
from ptq_cli.numerics.output_errors import Measures, measure, output_errors
from ptq_cli.numerics.parallel import use_threads
from ptq_cli.numerics.rounding import grid_by_zeros, round_to_nearest
from ptq_cli.numerics.statistics import HELDOUT_LIMIT
from ptq_cli.numerics.weak_inputs import weak_inputs
from ptq_cli.plan.units import few_tokens, sites_of
from ptq_cli.report.report import dead_inputs, totals
from ptq_cli.report.weak import weaknesses, with_weakness
from ptq_cli.run.nearest import as_run, inputs_of
from ptq_cli.run.quantize_unit import layer_row
from ptq_cli.storage.machine import cores
from ptq_cli.storage.output import check_free, free_space
from ptq_cli.storage.quantized import QuantizedFolder
from ptq_cli.storage.scratch import temporary_folder, temporary_place


def layer_memory(layer: Layer, n_tokens: int) -> int:
    """Bytes that measuring one layer takes, with statistics of so many tokens (0: without)."""
    return 24 * layer.size + (statistics_bytes(layer.shape[1], n_tokens) if n_tokens else 0)


def statistics_bytes(in_features: int, n_tokens: int) -> int:
    """Bytes of the statistics of a site, and of the same behind the folds."""
    return in_features * (8 * in_features + 12 * min(HELDOUT_LIMIT, n_tokens))


def evaluate(sides: Sides, listen: Listener = nobody) -> RunReport:
    """Measure every quantized layer.

    Raises:
        InputError: the two do not belong together; the statistics do not fit.
    """
    begin = time.perf_counter()
    original, quantized, source = sides.original, sides.quantized, sides.source
    different, missing = compare_untouched(sides.smoothed, quantized)
    site_of = sites_of(quantized.layers, source)
    rows: dict[str, LayerReport] = {}
    weights, work = sum(layer.size for layer in quantized.layers.values()), 0
    with threadpool_limits(1), use_threads(cores()), ExitStack() as held:
        found = held.enter_context(closing(_with_statistics(sides, site_of)))
        for layer, loaded in found:
            row = rows[layer.module] = _row(layer, sides, loaded)
            count, total, work = len(rows), len(quantized.layers), work + layer.size
            listen(Progress("measure", count, total, layer.module, work, weights, row))
    ordered = with_weakness([rows[module] for module in quantized.layers])
    skipped = tuple(
        Skipped(name, spec.shape, spec.dtype, "different" if name in different else "")
        for name in quantized.untouched()
        for spec in (quantized.checkpoint.tensors[name].spec,)
    )
    of_rows = weaknesses(ordered)
    bytes_before = sum(tensor.spec.nbytes for tensor in original.tensors.values())
    bytes_after = sum(tensor.spec.nbytes for tensor in quantized.checkpoint.tensors.values())
    return RunReport(
        command="eval",
        rows=tuple(ordered),
        skipped=skipped,
        totals=totals(ordered, skipped, bytes_before, bytes_after, time.perf_counter() - begin),
        warnings=(
            *_warnings(different, missing, quantized, source, site_of),
            *dead_inputs(ordered),
            *of_rows,
        ),
        settings=_settings(quantized),
        weak=(*(() if source is None else source.weak), *of_rows),
    )


def _settings(quantized: QuantizedFolder) -> dict[str, str]:
    """What the folder says of itself."""
    cache = quantized.kv_cache
    return {"format": quantized.fmt.name} | ({} if cache is None else {"kv_cache": cache.setting})


@dataclass(frozen=True)
class Loaded:
    """Statistics of a site's inputs: the original's, and behind the folds; and what is wrong with
    them (numerics/weak_inputs.py)."""

    before: SiteStatistics
    behind: SiteStatistics
    weak: Mapping[str, float]


def _with_statistics(
    sides: Sides, site_of: Mapping[str, str]
) -> Generator[tuple[Layer, Loaded | None], None, None]:
    """Every layer, with the statistics of its inputs where there are any."""
    source = sides.source
    if source is not None and source.in_sequence:
        yield from _in_sequence(sides, source, site_of)
        return
    loaded: Loaded | None = None
    for module, layer in sides.quantized.layers.items():
        site = site_of.get(module)
        if site is None or source is None:
            loaded = None
        elif loaded is None or loaded.before.site != site:
            loaded = _loaded(sides, source.load(site))
        yield layer, loaded


def _in_sequence(
    sides: Sides, source: Source, site_of: Mapping[str, str]
) -> Generator[tuple[Layer, Loaded | None], None, None]:
    """The same where statistics are made on the way: in the order of the forward."""
    of_site: dict[str | None, list[Layer]] = {}
    for module, layer in sides.quantized.layers.items():
        of_site.setdefault(site_of.get(module), []).append(layer)
    check_free(temporary_place(), source.scratch(None), free_space(temporary_place()))
    with temporary_folder() as work:
        for site, statistics in through_sites(source, work, [site for site in of_site if site]):
            loaded = _loaded(sides, statistics)
            for layer in of_site[site]:
                yield layer, loaded
    for layer in of_site.get(None, ()):
        yield layer, None


def _loaded(sides: Sides, statistics: SiteStatistics | None) -> Loaded | None:
    if statistics is None or sides.smoothed_source is None:
        return None
    return Loaded(statistics, sides.smoothed_source.fold(statistics), weak_inputs(statistics))


def _row(layer: Layer, sides: Sides, loaded: Loaded | None) -> LayerReport:
    begin = time.perf_counter()
    before, statistics = (None, None) if loaded is None else (loaded.before, loaded.behind)
    weight, rounded = sides.original.weight(layer), sides.quantized.load(layer.module)
    folded, scale = sides.smoothed.weight(layer), sides.smoothed.output_scale(layer)
    grid = grid_by_zeros(rounded)
    plain = round_to_nearest(weight, grid)
    alone = measure(folded, rounded, inputs_of(statistics, exact=True), scale)
    measures = as_run(alone, folded, layer, rounded, statistics, scale)
    rtn = _plainly(layer, weight, plain, before)
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
        sym=grid.sym,
        fallback="codes equal round-to-nearest" if same else None,
        seconds=time.perf_counter() - begin,
        activations=activations,
        weak=None if loaded is None else loaded.weak or None,
    )


def _plainly(
    layer: Layer, weight: FloatArray, plain: QuantizedWeight, statistics: SiteStatistics | None
) -> Measures:
    """Of the original weight rounded to nearest, its inputs rounded as the layer's are. A static
    scale is found anew: the one that is stored belongs to what was quantized."""
    inputs = layer.activation
    if inputs is not None and inputs.calibrated and statistics is not None:
        if inputs.sym:
            own = calibrated_scale(statistics.absmax, inputs)
            plain = replace(plain, input_scale=own)
        else:
            layer = replace(layer, activation=replace(inputs, dynamic=True, per_token=False))
    alone = measure(weight, plain, inputs_of(statistics, exact=True))
    return as_run(alone, weight, layer, plain, statistics)


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
    warnings += [f"{source.name}: {reason}" for reason in source.weak]
    bare = [x for x in quantized.layers if x not in site_of and not is_embedding(x)]
    if bare:
        warnings.append(
            f"{len(bare)} layers have no statistics, their errors are those of the weights:"
            f" {fold_names(bare)}"
        )
    used = [source.sites[site] for site in dict.fromkeys(site_of.values())]
    return warnings + few_tokens(used)
