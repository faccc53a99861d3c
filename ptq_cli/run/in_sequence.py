"""The loop where each unit needs those before it: calibrated on what the rounded model computes,
from rounded embeddings up to the head.

Beside the model that is rounded runs the float model, where the drift is made up for; after a stage
both go on, the one through the rounded weights, the other through its own. A run that was
interrupted goes on at the last block whose boundary is there, with the layers that it rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from ptq_cli.calibration.from_tokens import TokenSource
from ptq_cli.calibration.stream import Decode
from ptq_cli.calibration.streams import Streams
from ptq_cli.core.layer import Unit
from ptq_cli.core.report import LayerReport
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.errors import stated_in
from ptq_cli.models.ties import is_embedding
from ptq_cli.numerics.parallel import use_threads
from ptq_cli.run.kv_cache import CacheInSequence
from ptq_cli.run.smooth_in_sequence import BEFORE, Order, SmoothInSequence
from ptq_cli.run.unit_job import finish
from ptq_cli.run.work import Work
from ptq_cli.storage import interruption
from ptq_cli.storage.machine import cores


def quantize_in_sequence(work: Work) -> None:
    """What an interrupted run has finished is taken over; then the blocks, and what is in none."""
    source, resources = work.source, work.options.resources
    assert isinstance(source, TokenSource)  # it is one in sequence
    smoothing = work.job.smoothing
    smooth = None if smoothing is None else SmoothInSequence(work, smoothing)
    cache = None if work.plan.kv_cache is None else CacheInSequence(work, work.plan.kv_cache)
    missing = []
    for unit in work.plan.units:
        rows = work.unit_job(unit).kept()
        if rows is None:
            missing.append(unit)
        else:
            work.add(unit.name, rows, kept=True)
    folder, memory = work.staging.folder / "stream", resources.max_memory
    streams = Streams(source, folder, resources.workers, memory, work.checkpoint)
    with use_threads(resources.crew_for(cores())):
        streams.embedded = _embedded(work, missing)
        if smooth is not None:
            streams.divisors = smooth.divisors
            smooth.settle(BEFORE, streams)
        _through_blocks(work, streams, smooth, cache, {unit.name for unit in missing})
        for unit in missing:
            if unit.site is None and not _embeds(unit):
                work.add(unit.name, _round(work, unit, None), kept=False)
    if smooth is not None:
        work.smoothed = smooth.result()
    if cache is not None:
        work.kv_cache = cache.rows()


def _embeds(unit: Unit) -> bool:
    return unit.site is None and is_embedding(unit.layers[0].module)


def _embedded(work: Work, missing: Sequence[Unit]) -> Mapping[str, Decode]:
    """Embeddings have no inputs and come before all that has: round them first."""
    for unit in filter(_embeds, missing):
        work.add(unit.name, _round(work, unit, None), kept=False)
    return _decoded(work, [unit for unit in work.plan.units if _embeds(unit)])


def _through_blocks(
    work: Work,
    streams: Streams,
    smooth: SmoothInSequence | None,
    cache: CacheInSequence | None,
    missing: Collection[str],
) -> None:
    """for block: for stage: smooth → (statistics → round → prove → stage) → scales of the cache →
    both models go on."""
    units_at: dict[Order, list[Unit]] = {}
    for unit in work.plan.units:
        if unit.site is not None:
            units_at.setdefault(streams.place(unit.site).order, []).append(unit)
    todo = [order for order, units in units_at.items() if any(u.name in missing for u in units)]
    todo += [] if smooth is None else smooth.orders
    todo += [] if cache is None else cache.orders
    if not todo:
        return
    streams.enter(min(todo)[0])
    for order in streams.orders(max(todo)):
        here = units_at.get(order, [])
        if smooth is not None:
            smooth.settle(order, streams)
        unrounded = [unit for unit in here if unit.name in missing]
        for unit in unrounded:
            statistics = streams.statistics(str(unit.site))
            if smooth is not None:
                smooth.keep_plain(statistics)
            leaves = unit is unrounded[-1] and order < max(todo)
            with streams.float_ahead() if leaves else nullcontext():
                work.add(unit.name, _round(work, unit, statistics), kept=False)
        rounded = _decoded(work, here) if order < max(todo) or cache is not None else {}
        if cache is not None:
            cache.settle(streams, rounded)
        if order < max(todo):
            streams.advance(rounded)


def _round(work: Work, unit: Unit, statistics: SiteStatistics | None) -> list[LayerReport]:
    """Round → prove → stage. Without statistics of its site a unit is rounded to nearest."""
    interruption.check()
    how = unit
    if unit.site is not None and statistics is None:
        how = replace(unit, nearest="no token reaches it")
    with stated_in(unit.name):
        return finish(work.unit_job(unit), how, statistics)


def _decoded(work: Work, units: Sequence[Unit]) -> Mapping[str, Decode]:
    """What gives what the rounded model has in place of its tensors from here on; nothing where the
    layers before a unit do not feed it."""
    if work.source is None or not work.source.feedback:
        return {}
    return {name: give for unit in units for name, give in work.unit_job(unit).decoded().items()}
