"""The loops of `ptq calibrate`, in any order or in sequence: for site: statistics → stage; then the
statistics file.

In any order, the parts of a large site are tasks of their own. What one gives is kept like a
finished unit, so that it survives a kill, and is dropped once all are merged. How they are merged
(calibration/source.py) depends on the tokens alone, and so do the bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli._version import __version__
from ptq_cli.calibration.from_file import file_content, site_entry, site_statistics, site_tensors
from ptq_cli.calibration.from_tokens import TokenSource
from ptq_cli.calibration.source import Parts, Source, halves
from ptq_cli.calibration.streams import Streams
from ptq_cli.core.progress import Listener, Progress
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.run.schedule import Resources, Task, run_tasks
from ptq_cli.run.workers import hire
from ptq_cli.storage.digest import digest_words
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_array, as_bytes, own_metadata, serialize
from ptq_cli.storage.units import Key, UnitStore

WORTH_A_PROCESS = 1 << 33  # multiplications


def calibrate_sites(
    source: Source, model: str, staging: Staging, listen: Listener, resources: Resources
) -> dict[str, Any]:
    """Make the statistics of every site of the source, stage them, write the file.

    model: fingerprint of the weights

    Returns what the file's metadata says of each site, the sites that no token reaches, and the
    seconds it took.
    """
    begin, source = time.perf_counter(), replace(source, described=True)
    with threadpool_limits(1):
        run = _in_sequence if source.in_sequence else _in_any_order
        run(source, staging, listen, resources)
    results = {site: staging.store.result(site) for site in source.sites}
    entries = {site: entry for site, entry in results.items() if entry is not None}
    units = [*entries, *_stage_fisher(source, staging)]
    tensors = [tensor for unit in units for tensor in staging.store.tensors(unit)]
    content = file_content(model, source.heldout, entries, source.fisher, source.weak)
    serialize(staging.out, tensors, own_metadata({**content, "job": dict(staging.job)}))
    staging.publish()
    return {
        "sites": content["sites"],
        "without_tokens": [site for site in results if site not in entries],
        "seconds": time.perf_counter() - begin,
    }


# ---- in sequence ----


def _in_sequence(source: Source, staging: Staging, listen: Listener, resources: Resources) -> None:
    """for block: for stage: for site: statistics → stage; the float model goes on."""
    size = statistics_bytes(source)
    staging.check_space(size, size, source.scratch(resources.max_memory))
    efforts = {site: _effort(info) for site, info in source.sites.items()}
    work, total = 0, sum(efforts.values())
    assert isinstance(source, TokenSource)  # it is one in sequence
    work_folder = staging.folder / "stream"
    streams = Streams(source, work_folder, resources.workers, resources.max_memory)
    missing = [site for site in source.sites if not staging.finished(site)]
    if missing:
        streams.enter(streams.place(missing[0]).block)
    for done, site in enumerate(source.sites, 1):
        kept = site not in missing
        if not kept:
            while streams.order < streams.place(site).order:
                streams.advance({})
            begin = time.perf_counter()
            statistics = streams.statistics(site)
            if statistics is None:
                staging.put(site, [], None)
            else:
                _keep(staging.store, site, statistics, {}, time.perf_counter() - begin)
        work += efforts[site]
        listen(Progress("calibrate", done, len(efforts), site, work, total, kept=kept))


# ---- in any order ----


@dataclass(frozen=True)
class SiteJob:
    """All that a worker must know to make the statistics of one site, or of one of its parts."""

    site: str
    source: Source
    store: UnitStore
    parts: Parts

    @property
    def whole(self) -> bool:
        return self.parts == self.source.all_parts(self.site)

    @property
    def unit(self) -> str:
        """The name that its result is kept under. (No site of activations has a slash in it.)"""
        return self.site if self.whole else f"{self.site}/{self.parts}"

    def each_part(self) -> list[SiteJob]:
        """Its parts, where it has several."""
        numbers = range(*self.parts)
        return [replace(self, parts=(n, n + 1)) for n in numbers] if len(numbers) > 1 else []

    def task(self) -> Task:
        """The task that makes them."""
        if self.whole:
            return Task(self.site, self.source.load_memory(self.site), make, self)
        number, count = self.parts[1], self.source.all_parts(self.site)[1]
        name = f"{self.site}, part {number} of {count}"
        return Task(name, self.source.part_memory(self.site), make, self)


def first_tasks(site: SiteJob) -> list[Task]:
    """What can begin at once: the parts, unless an interrupted run has made the whole of them."""
    parts = [] if site.store.exists(site.unit) else site.each_part()
    return [job.task() for job in parts or [site]]


def _in_any_order(source: Source, staging: Staging, listen: Listener, resources: Resources) -> None:
    """for site: statistics → stage, on workers, large sites in parts that are merged."""
    sites = {
        site: SiteJob(site, source.only(site), staging.store, source.all_parts(site))
        for site in source.sites
    }
    first = {site: first_tasks(job) for site, job in sites.items()}
    waiting = {site: len(tasks) for site, tasks in first.items()}
    tasks = [task for own in first.values() for task in own]
    efforts = {  # parts are about equal
        task.name: _effort(source.sites[site]) // len(own)
        for site, own in first.items()
        for task in own
    }
    total, work, finished = sum(efforts.values()), 0, 0

    def done(task: Task, kept: bool) -> list[Task]:
        nonlocal work, finished
        job = task.argument
        work += efforts.get(task.name, 0)  # a merge is no work to speak of
        finished += job.whole
        waiting[job.site] -= 1
        listen(Progress("calibrate", finished, len(sites), task.name, work, total, kept=kept))
        merges = waiting[job.site] == 0 and not job.whole
        return [sites[job.site].task()] if merges else []

    with hire(resources.crew_for(workers_at_most(source)), resources.scheduler) as crew:
        size = statistics_bytes(source)
        staging.check_space(size + parts_bytes(source, crew.size), size)
        run_tasks(tasks, crew, resources.memory_of(crew), done)


def make(job: SiteJob) -> bool:
    """Make and keep the statistics of a site or of one of its parts, unless a run before this one
    has: then True."""
    store, parts = job.store, job.each_part()
    kept = store.exists(job.unit) and store.reusable(job.unit, _key(job.site, _digest(job)))
    if not kept:
        begin = time.perf_counter()
        there = parts and all(store.whole(part.unit) for part in parts)
        digest, statistics = _merged(job) if there else _summed(job)
        seconds = time.perf_counter() - begin
        _keep(store, job.unit, statistics, _key(job.site, digest), seconds)
    for part in parts:
        store.drop(part.unit)
    return kept


def _keep(
    store: UnitStore, unit: str, statistics: SiteStatistics, key: Key, seconds: float
) -> None:
    """Stage the statistics of a site."""
    store.put(unit, key, site_tensors(statistics), site_entry(statistics), seconds)


def _key(site: str, digest: str | None) -> Key:
    """What a finished unit must have been made from to be taken over."""
    return {"activations": {site: digest}, "version": __version__}


def _digest(job: SiteJob) -> str | None:
    return job.source.digest(job.site, job.parts)


def _summed(job: SiteJob) -> tuple[str | None, SiteStatistics]:
    """The digest of tokens, and their statistics."""
    return _digest(job), job.source.load(job.site, job.parts)


def _merged(job: SiteJob) -> tuple[str, SiteStatistics]:
    """The statistics of parts that are there, and the digest of what they were made from."""
    if not job.each_part():
        entry, tensors = job.store.entry(job.unit), job.store.tensors(job.unit)
        arrays = {t.spec.name.removeprefix(f"{job.site}."): as_array(t) for t in tensors}
        linears = job.source.sites[job.site].linears
        statistics = site_statistics(job.site, linears, entry["result"], arrays)
        return entry["key"]["activations"][job.site], statistics
    below = (_merged(replace(job, parts=half)) for half in halves(job.parts))
    (first, left), (second, right) = below
    return digest_words(first, second), job.source.merged(left, right)


# ---- how much it is ----


def _effort(info: SiteInfo) -> int:
    """Multiplications of its Hessian."""
    return info.n_tokens * info.in_features**2


def workers_at_most(source: Source) -> int:
    """How many processes are worth their start."""
    work = sum(_effort(info) for info in source.sites.values())
    return 1 + work // WORTH_A_PROCESS


def statistics_bytes(source: Source) -> int:
    """Of the file, about: Hessians and held-out inputs make it."""
    return sum(_site_bytes(source, site) for site in source.sites)


def _site_bytes(source: Source, site: str) -> int:
    info, limit = source.sites[site], source.heldout[1]
    return 4 * info.in_features * (info.in_features + min(limit, info.n_tokens) + 8)


def parts_bytes(source: Source, workers: int) -> int:
    """Bytes of what waits to be merged, at most: merges come first, so that hardly more sites than
    there are workers are in parts at any time."""
    counts = {site: source.all_parts(site)[1] for site in source.sites}
    sizes = [(count + 1) * _site_bytes(source, site) for site, count in counts.items() if count > 1]
    return sum(sorted(sizes)[-workers - 1 :])


def _stage_fisher(source: Source, staging: Staging) -> list[str]:
    """Stage the Fisher information of every module that has gradients; the units' names."""
    units = []
    for module in source.fisher:
        unit = f"{module}.fisher"
        if not staging.finished(unit):
            staging.put(unit, [as_bytes(unit, source.load_fisher(module))], None)
        units.append(unit)
    return units
