"""A quantization, planned and at work: what the loops share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import Layer, Plan, Unit
from ptq_cli.core.progress import Progress
from ptq_cli.core.report import LayerReport
from ptq_cli.models.experts import every_expert_is_linear
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.run.quantize_unit import Rounding
from ptq_cli.run.schedule import RunOptions
from ptq_cli.run.settle import Smoothing
from ptq_cli.run.smooth import Smoothed
from ptq_cli.run.unit_job import UnitJob
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.experts import fused_again, left_fused
from ptq_cli.storage.shards import Shards
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import Bytes
from ptq_cli.storage.units import UnitStore


@dataclass(frozen=True)
class Quantization:
    """A planned quantization. (A plan without units is smoothed only.)

    grid: its settings of the grid
    inputs: fingerprints of what is read, for quantization.json
    smoothing: the stage before the rounding, or None
    """

    command: str
    plan: Plan
    checkpoint: Checkpoint
    source: Source | None
    rounding: Rounding
    grid: GridSettings
    inputs: Mapping[str, str]
    smoothing: Smoothing | None = None

    @property
    def layers(self) -> dict[str, Layer]:
        """Those that are rounded, if only to judge a smoothing, by module."""
        smoothed = () if self.smoothing is None else self.smoothing.layers.values()
        return {layer.module: layer for layer in (*self.plan.layers, *smoothed)}

    @property
    def in_sequence(self) -> bool:
        """Whether each unit needs those before it. (Smoothing before any rounding does not: what
        the float model gives its sites is calibrated first.)"""
        source = self.source
        if source is None or not source.in_sequence:
            return False
        return source.feedback or self.smoothing is None

    @cached_property
    def written(self) -> Mapping[str, StoredTensor]:
        """The checkpoint's tensors in the order of the output, rounded ones under their own names.
        Experts that came as one tensor of all stay so where none of them changes and the format's
        runtimes read them so."""
        tensors, changed = self.checkpoint.tensors, {layer.tensor for layer in self.plan.layers}
        if self.smoothing is not None:
            changed |= self.smoothing.tensors
        if every_expert_is_linear(self.checkpoint.config, self.plan.format):
            changed |= tensors.keys()
        return fused_again(tensors, left_fused(tensors, changed))

    @property
    def looks_ahead(self) -> bool:
        """Whether sites are smoothed on what they would see before it is their turn."""
        return self.in_sequence and self.smoothing is not None

    def scratch(self, memory: int | None) -> int:
        """Bytes of a stream's files. memory: as of `Source.scratch`"""
        return 0 if self.source is None else self.source.scratch(memory, ahead=self.looks_ahead)


class BackgroundCopy:
    """Copies finished tensors to their places in `shards` while others are still being worked on;
    without shards it does nothing.

    One thread copies, so that the disk is busy from the beginning and nothing is left to write at
    the end but headers. It holds no work that could be lost: units wait for nobody, and are copied
    again where a run is interrupted.
    """

    def __init__(self, shards: Shards | None) -> None:
        self._shards = shards
        self._thread = ThreadPoolExecutor(1)
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._check()

    def put(self, tensors: Iterable[Bytes | StoredTensor]) -> None:
        """Have tensors copied. Raises FileError of an earlier copy."""
        self._submit(lambda shards: shards.put(tensors))

    def put_unit(self, store: UnitStore, unit: str) -> None:
        """Have the tensors of a finished unit copied, where they are not in their places yet."""

        def copy(shards: Shards) -> None:
            tensors = store.tensors(unit)
            if store.entry(unit)["placed"]:
                shards.take(tensor.spec.name for tensor in tensors)
            else:
                shards.put(tensors)

        self._submit(copy)

    def _submit(self, copy: Callable[[Shards], None]) -> None:
        self._check()
        if self._shards is not None:
            self._running.append(self._thread.submit(copy, self._shards))

    def _check(self) -> None:
        """Raises what a copy met."""
        while self._running and self._running[0].done():
            self._running.popleft().result()


@dataclass
class Work:
    """A run under way.

    checkpoint, source: as smoothed, as soon as that is known
    rows: of the report, by module; done: weights of their layers
    smoothed: what the smoothing has found
    kv_cache: what the report says of each block's cache
    """

    job: Quantization
    staging: Staging
    store: UnitStore
    copy: BackgroundCopy
    options: RunOptions
    checkpoint: Checkpoint
    source: Source | None
    plan: Plan
    rows: dict[str, LayerReport] = field(default_factory=dict)
    done: int = 0
    smoothed: Smoothed | None = None
    kv_cache: tuple[Mapping[str, Any], ...] = ()

    def unit_job(self, unit: Unit) -> UnitJob:
        """What a worker must know to do the unit."""
        fmt = self.job.rounding.fmt
        tensors = self.checkpoint.part(layer.tensor for layer in (*unit.layers, *unit.beside))
        names = [spec.name for layer in unit.layers for spec in fmt.specs(layer)]
        places = {name: self.store.places[name] for name in names if self.store.places}
        own = None if self.source is None or unit.site is None else self.source.only(unit.site)
        store = replace(self.store, places=places)
        return UnitJob(unit, tensors, own, self.job.rounding, store)

    def add(self, unit: str, rows: Iterable[LayerReport], kept: bool) -> None:
        """A unit is finished: its tensors are copied to their places, its rows are told."""
        self.copy.put_unit(self.store, unit)
        sizes, total = self._sizes
        for row in rows:
            self.rows[row.module] = row
            self.done += sizes[row.module]
            count, of = len(self.rows), len(sizes)
            step = Progress("quantize", count, of, row.module, self.done, total, row, kept=kept)
            self.options.listen(step)

    @cached_property
    def _sizes(self) -> tuple[Mapping[str, int], int]:
        """Weights of each module, and of all: summed once, since a model may have many thousand."""
        sizes = {layer.module: layer.size for layer in self.plan.layers}
        return sizes, sum(sizes.values())

    def copy_untouched(self, names: Iterable[str]) -> None:
        """Have tensors copied that are not quantized."""
        rounded = {layer.tensor for layer in self.plan.layers}
        held, written = self.checkpoint, self.job.written
        self.copy.put(
            held.copyable(name) if name in held.tensors else written[name]
            for name in names
            if name not in rounded
        )
