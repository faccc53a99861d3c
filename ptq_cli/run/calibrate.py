"""Calibration: which activations belong to which linears, and the loop that turns them into
statistics."""

from __future__ import annotations

import time
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli.calibration.from_activations import Activations
from ptq_cli.calibration.from_file import file_content
from ptq_cli.calibration.source import (
    PortableSource,
    StatisticsSource,
    StreamingSource,
    scratch_of,
)
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.core.statistics import SiteInfo
from ptq_cli.run.schedule import THIS_PROCESS, Resources, Task, run_tasks
from ptq_cli.run.site_statistics import SiteJob, SiteTasks, tokens_of
from ptq_cli.run.workers import hire
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_bytes, own_metadata, serialize

WORTH_A_PROCESS = 1 << 33  # multiplications


def calibrate_sites(
    source: StatisticsSource,
    model: str,
    heldout: tuple[int, int],
    staging: Staging,
    listen: Listener = nobody,
    resources: Resources = THIS_PROCESS,
) -> dict[str, Any]:
    """Make the statistics of every site of `source`, stage them, write the file.

    Returns what the file's metadata says of each site, the sites that no token reaches, and the
    seconds it took.
    """
    begin = time.perf_counter()
    entries: dict[str, Any] = {}
    bare: list[str] = []
    with threadpool_limits(1):
        _run_sites(source, staging, heldout, resources, listen, entries, bare)
    fisher = _stage_fisher(source, staging)
    filled = [site for site in source.sites if site in entries]
    units = [*filled, *fisher]
    tensors = [tensor for unit in units for tensor in staging.tensors(unit)]
    content = file_content(model, heldout, entries, source.fisher)
    serialize(staging.out, tensors, own_metadata({**content, "job": dict(staging.job)}))
    staging.publish()
    return {
        "sites": {site: entries[site] for site in filled},
        "without_tokens": bare,
        "seconds": time.perf_counter() - begin,
    }


def _run_sites(
    source: StatisticsSource,
    staging: Staging,
    heldout: tuple[int, int],
    resources: Resources,
    listen: Listener,
    entries: dict[str, Any],
    bare: list[str],
) -> None:
    """Stage the statistics of every site; what is to be said of each goes into `entries`, the sites
    without tokens into `bare`."""
    portable = isinstance(source, PortableSource)
    if isinstance(source, StreamingSource):
        work_folder = staging.folder / "stream"
        source.begin(work_folder, lambda tensor: None, resources.workers, resources.max_memory)
    trees = {site: SiteTasks(site, source, staging.store) for site in source.sites}
    tasks = [task for tree in trees.values() for task in tree.first()]
    efforts = {task.name: _effort(task.argument) for task in tasks}
    total, all_work, work = len(trees), sum(efforts.values()), 0

    def done(task: Task, result: Any) -> list[Task]:
        nonlocal work
        job, (entry, kept) = task.argument, result
        if job.unit != job.site:
            pass
        elif entry is None:
            bare.append(job.site)
        else:
            entries[job.site] = entry
        work += efforts.get(task.name, 0)  # a merge is no work to speak of
        count = len(entries) + len(bare)
        listen(Progress("calibrate", count, total, task.name, work, all_work, kept=kept))
        return trees[job.site].after(job)

    size = resources.crew_for(workers_at_most(source)) if portable else 1
    with hire(size, resources.scheduler if portable else None) as crew:
        size, parts = statistics_bytes(source, heldout), parts_bytes(source, heldout, crew.size)
        staging.check_space(size + parts, size, scratch_of(source))
        run_tasks(tasks, crew, resources.memory_of(crew), done, in_order=not portable)


def _effort(job: SiteJob) -> int:
    """Multiplications of its Hessian."""
    return tokens_of(job) * job.source.sites[job.site].in_features ** 2


def workers_at_most(source: StatisticsSource) -> int:
    """How many processes are worth their start."""
    work = sum(info.n_tokens * info.in_features**2 for info in source.sites.values())
    return 1 + work // WORTH_A_PROCESS


def statistics_bytes(source: StatisticsSource, heldout: tuple[int, int]) -> int:
    """Of the file, about: Hessians and held-out inputs make it."""
    return sum(_site_bytes(info, heldout) for info in source.sites.values())


def _site_bytes(info: SiteInfo, heldout: tuple[int, int]) -> int:
    n = info.in_features
    return 4 * n * (n + min(heldout[1], info.n_tokens) + 8)


def parts_bytes(source: StatisticsSource, heldout: tuple[int, int], workers: int) -> int:
    """Bytes of what waits to be merged, at most: merges come first, so that hardly more sites than
    there are workers are in parts at any time."""
    if not isinstance(source, Activations):
        return 0
    counts = {site: source.all_parts(site)[1] for site in source.sites}
    sizes = [
        (count + 1) * _site_bytes(source.sites[site], heldout)
        for site, count in counts.items()
        if count > 1
    ]
    return sum(sorted(sizes)[-workers - 1 :])


def site_memory(source: StatisticsSource, site: str) -> int:
    """Bytes that making a site's statistics takes: those of one of its parts."""
    if isinstance(source, Activations):
        return source.part_memory(site)
    return source.load_memory(site)


def _stage_fisher(source: StatisticsSource, staging: Staging) -> list[str]:
    """Stage the Fisher information of every module that has gradients; the units' names."""
    units = []
    for module in source.fisher:
        unit = f"{module}.fisher"
        if not staging.finished(unit):
            staging.put(unit, [as_bytes(unit, source.load_fisher(module))], None)
        units.append(unit)
    return units
