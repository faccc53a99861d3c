"""One unit in a worker: statistics and weights are read, layers rounded and proven, and what they
became is staged. Names and settings travel, no arrays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ptq_cli._version import __version__
from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import Layer, Unit
from ptq_cli.core.report import LayerReport
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import NumericalError
from ptq_cli.models.forward.layers import Tensor
from ptq_cli.models.forward.linear import as_tensor
from ptq_cli.numerics.scales import ScaleMisfit
from ptq_cli.report.report import row_from_json
from ptq_cli.run.quantize_unit import LayerWeight, Rounding, quantize_unit
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.digest import digest_words
from ptq_cli.storage.rows import FileRows
from ptq_cli.storage.shards import mapped
from ptq_cli.storage.tensors import as_array, as_bytes
from ptq_cli.storage.units import UnitStore


@dataclass(frozen=True)
class UnitJob:
    """All that a worker must know to do one unit."""

    unit: Unit
    checkpoint: Checkpoint
    source: Source | None
    rounding: Rounding
    store: UnitStore

    def key(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """What a finished unit must have been made from to be taken over. digests: of tensors"""
        rounding, site = self.rounding, self.unit.site
        unit = replace(self.unit, memory=0)
        return {
            "tensor": dict(digests),
            "statistics": None if self.source is None or site is None else self.source.digest(site),
            "settings": digest_words(__version__, repr(unit), repr(rounding)),
        }

    def kept(self) -> list[LayerReport] | None:
        """The report's rows of the unit, where a run before this one has finished it."""
        if not self.store.exists(self.unit.name):
            return None
        names = [layer.tensor for layer in (*self.unit.layers, *self.unit.beside)]
        digests = {name: self.checkpoint.digest(name) for name in names}
        if not self.store.reusable(self.unit.name, self.key(digests)):
            return None
        return [row_from_json(entry) for entry in self.store.result(self.unit.name)]

    def decoded(self) -> dict[str, Callable[[], Tensor]]:
        """What gives what the finished unit's tensors decode to, by the name of each layer's."""
        stored = self.store.stored(self.unit.name)
        return {layer.tensor: partial(self._decode, layer, stored) for layer in self.unit.layers}

    def _decode(self, layer: Layer, stored: Sequence[StoredTensor]) -> Tensor:
        staged = {tensor.spec.name: as_array(mapped(tensor)) for tensor in stored}
        return as_tensor(layer, self.rounding.fmt.decode(layer, staged))


def work_on(job: UnitJob) -> tuple[list[LayerReport], bool]:
    """Do the unit unless a run before this one has; the report's rows, and whether they are that
    run's."""
    kept = job.kept()
    if kept is not None:
        return kept, True
    statistics = None
    if job.source is not None and job.unit.site is not None:
        statistics = job.source.load(job.unit.site)
    return finish(job, job.unit, statistics), False


def finish(job: UnitJob, unit: Unit, statistics: SiteStatistics | None) -> list[LayerReport]:
    """Round → prove → stage; the report's rows. unit: the job's, or that without statistics"""
    begin = time.perf_counter()
    with ExitStack() as files:
        weights = Weights(job.checkpoint, job.source, job.rounding, files)
        try:
            with weights.misfits_checked():
                tensors, rows = quantize_unit(unit, statistics, weights.load, job.rounding)
        except NumericalError as error:
            error.hint = " or ".join(filter(None, (error.hint, "allow --fallback rtn")))
            raise
        digests = weights.digests()
    packed = [as_bytes(name, values) for name, values in tensors.items()]
    entries = [asdict(row) for row in rows]
    seconds = time.perf_counter() - begin
    job.store.put(job.unit.name, job.key(digests), packed, entries, seconds)
    return rows


@dataclass
class Weights:
    """The weights of a unit's layers as they are read, and the digests of what was read.

    source: of Fisher information, where that weighs the scale search
    files: closes what is read row by row
    """

    checkpoint: Checkpoint
    source: Source | None
    rounding: Rounding
    files: ExitStack
    _digests: dict[str, str] = field(default_factory=dict)
    _streamed: dict[str, FileRows] = field(default_factory=dict)

    def load(self, layer: Layer) -> LayerWeight:
        checkpoint = self.checkpoint
        outputs = checkpoint.output_scale(layer)
        importance = self._importance(layer)
        if checkpoint.streams(layer):
            rows = self.files.enter_context(FileRows(checkpoint, layer))
            self._streamed[layer.tensor] = rows
            return LayerWeight(rows, importance, outputs)
        self._digests[layer.tensor] = checkpoint.digest(layer.tensor)
        return LayerWeight(checkpoint.weight(layer), importance, outputs)

    def _importance(self, layer: Layer) -> FloatArray | None:
        """What weighs the layer's scale search: its Fisher information, where that is asked for."""
        source, rounding = self.source, self.rounding
        if source is None or not rounding.how.needs_fisher(rounding.settings):
            return None
        values = source.load_fisher(layer.module)
        values = values.reshape(layer.shape[::-1]).T if layer.transposed else values
        return np.ascontiguousarray(values).reshape(layer.shape)

    @contextmanager
    def misfits_checked(self) -> Iterator[None]:
        """A scale that does not fit is put down to a weight that is not finite, where one is."""
        try:
            yield
        except ScaleMisfit:
            self.check()
            raise

    def check(self) -> None:
        """Raises InputError where a weight that was streamed is not finite."""
        for rows in self._streamed.values():
            rows.check()

    def digests(self) -> dict[str, str]:
        return self._digests | {name: rows.digest() for name, rows in self._streamed.items()}
