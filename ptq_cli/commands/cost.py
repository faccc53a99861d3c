"""What a run computes, counted roughly: enough for an estimate of its time.

The counts of elementwise operations were made by reading the code and corrected by measuring
(benchmarks/estimate.py): what a core does with a value it has in its cache counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from math import prod
from operator import add
from typing import Any

from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import Layer, Unit
from ptq_cli.core.plugins import Method, Work
from ptq_cli.models.sites import Site
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT, SAMPLE_LIMIT, statistics_work
from ptq_cli.registry import method
from ptq_cli.run.settle import Settling

NEAREST = 24  # passes on a weight: read, rounded, packed, unpacked and compared
UNPACKED = 14  # packed, unpacked and compared once more, when a method has rounded it
MEASURED = 8
VERIFIED = 12  # the finished file, read back
LAYER_CALLS, UNIT_CALLS = 2000, 4000  # of a layer besides, and of a file written and synced


def total(works: Iterable[Work]) -> Work:
    return reduce(add, works, Work())


def heldout_tokens(n_tokens: int) -> int:
    return min(HELDOUT_LIMIT, n_tokens // (HELDOUT_EVERY - 1))


def measured(layer: Layer, n_tokens: int) -> Work:
    """Errors of one rounding, on the Hessian and on held-out inputs where there are any."""
    products = layer.shape[1] + 2 * heldout_tokens(n_tokens) if n_tokens else 0
    return Work(products, MEASURED) * layer.size


def rounded(layer: Layer, how: Method, settings: Any, n_tokens: int, nearest: bool) -> Work:
    """Plain rounding and the method's, both measured; nearest: plain rounding alone."""
    plain = measured(layer, n_tokens) + Work(0, NEAREST * layer.size, LAYER_CALLS)
    if nearest or how.is_nearest(settings):
        return plain
    own = how.work(layer.shape, layer.grid, settings)[1]
    return plain + own + measured(layer, n_tokens) + Work(0, UNPACKED * layer.size)


def unit_work(unit: Unit, how: Method, settings: Any, source: Source | None) -> Work:
    """One unit: its statistics, what its layers share, and each layer."""
    calibrated = source is not None and unit.site is not None
    n_tokens = source.sites[unit.site].n_tokens if source and unit.site else 0
    nearest = unit.nearest is not None
    works = [Work(calls=UNIT_CALLS)]
    works += [rounded(layer, how, settings, n_tokens, nearest) for layer in unit.layers]
    if calibrated and not nearest:
        layer = unit.layers[0]
        works.append(how.work(layer.shape, layer.grid, settings)[0])
    if source is not None and unit.site is not None:
        works.append(source_work(source, unit.site))
    return total(works)


def source_work(source: Source, site: str) -> Work:
    """Getting the statistics of one site."""
    info = source.sites[site]
    if not source.bytes_read(site):
        return statistics_work(info.n_tokens, info.in_features) * 3
    return statistics_work(info.n_tokens, info.in_features)


def smoothing_memory(job: Settling, site: Site) -> int:
    """Bytes that the work on one site takes: its weights as they were, folded and rounded, what
    rounds them, and a few matrices of the size of its Hessian."""
    layers = [job.layers[x.tensor] for x in site.linears if x.tensor in job.layers]
    how = method(job.rounding[0])
    most = max((how.memory(layer.shape, layer.grid, False) for layer in layers), default=0)
    weights = sum(prod(job.checkpoint.tensors[x.tensor].spec.shape) for x in site.linears)
    return most + 12 * weights + 16 * site.in_features**2


def smoothing_work(job: Settling, source: Source, site: Site) -> Work:
    """One site of the pass before the rounding, where one proposal of the search is tried."""
    return _site_work(job, source, site.linears, source_of(source, site.linears))


def source_of(source: Source, linears: Sequence[Any]) -> str | None:
    """The site of the statistics that serve these linears."""
    modules = {linear.module for linear in linears}
    return next((s for s, i in source.sites.items() if modules & {*i.linears}), None)


def _site_work(job: Settling, source: Source, linears: Sequence[Any], site: str | None) -> Work:
    layers = [job.layers[x.tensor] for x in linears if x.tensor in job.layers]
    if site is None or not layers:
        return Work()
    n_tokens, grid = source.sites[site].n_tokens, layers[0].grid
    how, settings = method(job.rounding[0]), job.rounding[1]
    nearest = total(rounded(layer, how, settings, n_tokens, True) for layer in layers)
    tried = total(rounded(layer, how, settings, n_tokens, False) for layer in layers)
    shared = how.work(layers[0].shape, grid, settings)[0]
    size = sum(layer.size for layer in layers)
    sample = min(SAMPLE_LIMIT, n_tokens)
    checked = Work(4 * sample, 30) * size + Work(calls=UNIT_CALLS)  # the function, in float64
    integers = Work(0 if job.activations.scheme == "none" else 3 * heldout_tokens(n_tokens)) * size
    search = job.smoother.work([layer.shape for layer in layers], sample, grid, job.settings)
    compared = total(
        (rounded(layer, other, own, n_tokens, False) + other.work(layer.shape, grid, own)[0])
        * (1 if name == job.smoother.name else 2)
        for name, own in job.compare.items()
        for other in (method(name),)
        for layer in layers
    )
    return (
        source_work(source, site) + nearest + (tried + shared + integers) * 2
        + checked + search + compared
    )  # fmt: skip
