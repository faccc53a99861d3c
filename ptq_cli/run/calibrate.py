"""The loops of `ptq calibrate`, in any order or in sequence: for site: statistics → stage; then the
statistics file."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli.calibration.from_file import file_content
from ptq_cli.calibration.from_tokens import TokenSource
from ptq_cli.calibration.source import Source
from ptq_cli.calibration.streams import Streams
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.core.statistics import SiteInfo
from ptq_cli.run.schedule import THIS_PROCESS, Resources, Task, run_tasks
from ptq_cli.run.site_statistics import SiteJob, SiteTasks, keep
from ptq_cli.run.workers import hire
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_bytes, own_metadata, serialize

WORTH_A_PROCESS = 1 << 33  # multiplications


@dataclass
class _Made:
    """What there is to say of the sites so far; bare: those that no token reaches."""

    total: int
    listen: Listener
    entries: dict[str, Any] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)

    def add(self, site: str, entry: Any) -> None:
        if entry is None:
            self.bare.append(site)
        else:
            self.entries[site] = entry

    def tell(self, name: str, work: float, all_work: float, kept: bool) -> None:
        done = len(self.entries) + len(self.bare)
        self.listen(Progress("calibrate", done, self.total, name, work, all_work, kept=kept))


def calibrate_sites(
    source: Source,
    model: str,
    staging: Staging,
    listen: Listener = nobody,
    resources: Resources = THIS_PROCESS,
) -> dict[str, Any]:
    """Make the statistics of every site of the source, stage them, write the file.

    model: fingerprint of the weights

    Returns what the file's metadata says of each site, the sites that no token reaches, and the
    seconds it took.
    """
    begin = time.perf_counter()
    made = _Made(len(source.sites), listen)
    with threadpool_limits(1):
        run = _in_sequence if source.in_sequence else _in_any_order
        run(source, staging, made, resources)
    fisher = _stage_fisher(source, staging)
    filled = [site for site in source.sites if site in made.entries]
    tensors = [tensor for unit in (*filled, *fisher) for tensor in staging.store.tensors(unit)]
    content = file_content(model, source.heldout, made.entries, source.fisher)
    serialize(staging.out, tensors, own_metadata({**content, "job": dict(staging.job)}))
    staging.publish()
    return {
        "sites": {site: made.entries[site] for site in filled},
        "without_tokens": made.bare,
        "seconds": time.perf_counter() - begin,
    }


def _in_sequence(source: Source, staging: Staging, made: _Made, resources: Resources) -> None:
    """for block: for stage: for site: statistics → stage; the float model goes on."""
    size = statistics_bytes(source)
    staging.check_space(size, size, source.scratch)
    efforts = {site: _effort(info, info.n_tokens) for site, info in source.sites.items()}
    work, total = 0, sum(efforts.values())
    assert isinstance(source, TokenSource)  # it is one in sequence
    work_folder = staging.folder / "stream"
    streams = Streams(source, work_folder, resources.workers, resources.max_memory)
    missing = [site for site in source.sites if not staging.finished(site)]
    if missing:
        streams.enter(streams.place(missing[0]).block)
    for site in source.sites:
        kept = site not in missing
        if not kept:
            while streams.order < streams.place(site).order:
                streams.advance({})
            _stage(streams, site, staging)
        work += efforts[site]
        made.add(site, staging.store.result(site))
        made.tell(site, work, total, kept)


def _stage(streams: Streams, site: str, staging: Staging) -> None:
    begin = time.perf_counter()
    statistics = streams.statistics(site)
    if statistics is None:
        staging.put(site, [], None)
    else:
        keep(staging.store, site, statistics, {}, time.perf_counter() - begin)


def _in_any_order(source: Source, staging: Staging, made: _Made, resources: Resources) -> None:
    """for site: statistics → stage, on workers, large sites in parts."""
    trees = {site: SiteTasks(site, source, staging.store) for site in source.sites}
    tasks = [task for tree in trees.values() for task in tree.first()]
    efforts = {task.name: _effort_of(task.argument) for task in tasks}
    total, work = sum(efforts.values()), 0

    def done(task: Task, result: Any) -> list[Task]:
        nonlocal work
        part, (entry, kept) = task.argument, result
        if part.unit == part.site:
            made.add(part.site, entry)
        work += efforts.get(task.name, 0)  # a merge is no work to speak of
        made.tell(task.name, work, total, kept)
        return trees[part.site].after(part)

    with hire(resources.crew_for(workers_at_most(source)), resources.scheduler) as crew:
        size = statistics_bytes(source)
        staging.check_space(size + parts_bytes(source, crew.size), size)
        run_tasks(tasks, crew, resources.memory_of(crew), done)


def _effort(info: SiteInfo, n_tokens: int) -> int:
    """Multiplications of its Hessian."""
    return n_tokens * info.in_features**2


def _effort_of(job: SiteJob) -> int:
    """Of a site, or of some of its parts, which are about equal."""
    info, (first, stop) = job.source.sites[job.site], job.parts
    share = info.n_tokens * (stop - first) // job.source.all_parts(job.site)[1]
    return _effort(info, share)


def workers_at_most(source: Source) -> int:
    """How many processes are worth their start."""
    work = sum(info.n_tokens * info.in_features**2 for info in source.sites.values())
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
