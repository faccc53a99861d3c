"""A quantization, planned and at work: what the loops share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import Plan, Unit
from ptq_cli.core.progress import Progress
from ptq_cli.core.report import LayerReport
from ptq_cli.models.sites import Site
from ptq_cli.report.report import row_from_json
from ptq_cli.run.background_copy import BackgroundCopy
from ptq_cli.run.schedule import RunOptions
from ptq_cli.run.settle import Settling
from ptq_cli.run.smooth import Smoothed
from ptq_cli.run.unit_job import Entries, Rounding, UnitJob
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.units import UnitStore


@dataclass(frozen=True)
class Smoothing:
    """The stage before rounding. sites: that may take factors"""

    settling: Settling
    sites: tuple[Site, ...]

    @property
    def tensors(self) -> set[str]:
        """What a fold may change."""
        return {tensor for site in self.sites for tensor in site.tensors}


@dataclass(frozen=True)
class Quantization:
    """A planned quantization. (A plan without units is smoothed only.)

    inputs: fingerprints of what is read, for quantization.json
    smoothing: the stage before the rounding, or None
    """

    command: str
    plan: Plan
    checkpoint: Checkpoint
    source: Source | None
    rounding: Rounding
    inputs: Mapping[str, str]
    smoothing: Smoothing | None = None

    @property
    def in_sequence(self) -> bool:
        """Whether each unit needs those before it. (Smoothing before any rounding does not: what
        the float model gives its sites is calibrated first.)"""
        source = self.source
        if source is None or not source.in_sequence:
            return False
        return source.feedback or self.smoothing is None

    @property
    def scratch(self) -> int:
        """Bytes of a stream's files; as much again for looking ahead, where it is smoothed too."""
        if self.source is None:
            return 0
        return self.source.scratch * (2 if self.in_sequence and self.smoothing else 1)


@dataclass
class Work:
    """A run under way.

    checkpoint, source: as smoothed, as soon as that is known
    rows: of the report, by module; done: weights of their layers
    smoothed: what the smoothing has found
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

    def unit_job(self, unit: Unit) -> UnitJob:
        """What a worker must know to do the unit."""
        fmt = self.job.rounding.fmt
        tensors = self.checkpoint.part(layer.tensor for layer in unit.layers)
        names = [spec.name for layer in unit.layers for spec in fmt.specs(layer)]
        places = {name: self.store.places[name] for name in names if self.store.places}
        own = None if self.source is None or unit.site is None else self.source.only(unit.site)
        store = replace(self.store, places=places)
        return UnitJob(unit, tensors, own, self.job.rounding, store)

    def add(self, unit: str, entries: Entries, kept: bool) -> None:
        """A unit is finished: its tensors are copied to their places, its rows are told."""
        self.copy.put_unit(self.store, unit)
        sizes, total = self._sizes
        for entry in entries:
            row = row_from_json(entry)
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
        tensors = self.checkpoint.tensors
        self.copy.put(tensors[name] for name in names if name not in rounded)
