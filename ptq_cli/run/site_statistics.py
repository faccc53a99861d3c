"""One site's statistics as tasks: a single one, or those of its parts and of their merges.

What a part gives is kept like a finished unit, so that it survives a kill, and is dropped once it
is merged with its neighbour. The tree (calibration/source.py) depends on the tokens alone, and so
do the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.calibration.from_file import site_entry, site_statistics, site_tensors
from ptq_cli.calibration.source import Parts, Source, halves
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.numerics.statistics import merge_memory
from ptq_cli.run.schedule import Task
from ptq_cli.storage.digest import digest_words
from ptq_cli.storage.tensors import as_array
from ptq_cli.storage.units import Key, UnitStore


@dataclass(frozen=True)
class SiteJob:
    """All that a worker must know to make the statistics of one site, or of some of its parts."""

    site: str
    source: Source
    store: UnitStore
    parts: Parts

    @property
    def unit(self) -> str:
        """The name that its result is kept under. (No site of activations has a slash in it.)"""
        whole = self.parts == self.source.all_parts(self.site)
        return self.site if whole else f"{self.site}/{self.parts}"

    def below(self) -> list[SiteJob]:
        """The two halves of more than one part."""
        if self.parts[1] - self.parts[0] == 1:
            return []
        return [SiteJob(self.site, self.source, self.store, half) for half in halves(self.parts)]


class SiteTasks:
    """The tasks of a site: what can begin at once, and what can follow each."""

    def __init__(self, site: str, source: Source, store: UnitStore) -> None:
        self._root = SiteJob(site, source.only(site), store, source.all_parts(site))
        self._missing: dict[str, set[str]] = {}  # halves that a merge still waits for
        self._above: dict[str, SiteJob] = {}

    def first(self) -> list[Task]:
        """Parts, and what an interrupted run has made of some."""
        return list(self._leaves(self._root))

    def _leaves(self, job: SiteJob) -> Iterable[Task]:
        below = job.below()
        if not below or job.store.exists(job.unit):
            yield self._task(job)
            return
        self._missing[job.unit] = {half.unit for half in below}
        for half in below:
            self._above[half.unit] = job
            yield from self._leaves(half)

    def after(self, done: SiteJob) -> list[Task]:
        """The merge that was waiting for this one alone, or nothing."""
        above = self._above.get(done.unit)
        if above is None:
            return []
        self._missing[above.unit].discard(done.unit)
        return [] if self._missing[above.unit] else [self._task(above)]

    def _task(self, job: SiteJob) -> Task:
        return Task(self._name(job), self._memory(job), make, job)

    def _name(self, job: SiteJob) -> str:
        if job.parts == self._root.parts:
            return job.site
        first, last, count = job.parts[0] + 1, job.parts[1], self._root.parts[1]
        which = f"part {first}" if first == last else f"parts {first} to {last}"
        return f"{job.site}, {which} of {count}"

    def _memory(self, job: SiteJob) -> int:
        if job.unit in self._missing:
            return merge_memory(job.source.sites[job.site].in_features)
        return job.source.load_memory(job.site) if job.below() else job.source.part_memory(job.site)


def make(job: SiteJob) -> tuple[dict[str, Any], bool]:
    """Make and keep the statistics of a site or of some of its parts, unless a run before this one
    has; what their entry says, and whether it is that run's."""
    store, unit = job.store, job.unit
    if store.reusable(unit, _key(job)):
        _drop(job.below())
        return store.result(unit), True
    begin = time.perf_counter()
    key, statistics = _sums(job)
    entry = keep(store, unit, statistics, key, time.perf_counter() - begin)
    _drop(job.below())
    return entry, False


def keep(
    store: UnitStore, unit: str, statistics: SiteStatistics, key: Key, seconds: float = 60.0
) -> dict[str, Any]:
    """Stage the statistics of a site; what their entry says."""
    entry = site_entry(statistics)
    store.put(unit, key, site_tensors(statistics), entry, seconds)
    return entry


def _key(job: SiteJob) -> Key:
    """What a finished unit must have been made from to be taken over."""
    return _key_of(job, job.source.digest(job.site, job.parts))


def _key_of(job: SiteJob, digest: str | None) -> Key:
    return {"activations": {job.site: digest}, "version": __version__}


def _sums(job: SiteJob) -> tuple[Key, SiteStatistics]:
    """The statistics and what they are made from: of tokens, or of two halves that are there."""
    below = job.below()
    if below and all(job.store.whole(half.unit) for half in below):
        digests = [job.store.entry(half.unit)["key"]["activations"][job.site] for half in below]
        left, right = map(_kept, below)
        return _key_of(job, digest_words(*digests)), job.source.merged(left, right)
    return _key(job), job.source.load(job.site, job.parts)


def _kept(job: SiteJob) -> SiteStatistics:
    """The statistics that a unit holds, memory-mapped."""
    tensors = job.store.tensors(job.unit)
    parts = {tensor.spec.name.removeprefix(f"{job.site}."): as_array(tensor) for tensor in tensors}
    linears = job.source.sites[job.site].linears
    return site_statistics(job.site, linears, job.store.result(job.unit), parts)


def _drop(jobs: Iterable[SiteJob]) -> None:
    """Make room: what was merged is of no more use, nor what lies under it."""
    for job in jobs:
        _drop(job.below())
        job.store.drop(job.unit)
