"""Calibration: which activations belong to which linears, and the loop that turns them into
statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli.choice import check_float, default_reason, model_sites, transposed_tensors
from ptq_cli.errors import InputError, PtqError
from ptq_cli.models.sharing import group_modules
from ptq_cli.progress import Listener, Progress, nobody
from ptq_cli.storage.activations import Activations, ActivationSite
from ptq_cli.storage.calibration import (
    PortableSource,
    SiteInfo,
    StatisticsSource,
    StreamingSource,
    file_content,
    scratch_of,
)
from ptq_cli.storage.checkpoint import Checkpoint, is_float
from ptq_cli.storage.npy import InputsFile
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_bytes, own_metadata, serialize
from ptq_cli.summing import SiteJob, SiteTasks, tokens_of
from ptq_cli.tasks import THIS_PROCESS, Resources, Task, run_tasks
from ptq_cli.workers import hire

WORTH_A_PROCESS = 1 << 33  # multiplications


@dataclass(frozen=True)
class Match:
    """Activations matched to sites, and what did not match."""

    entries: Mapping[str, ActivationSite]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]


def match_activations(checkpoint: Checkpoint, found: Mapping[str, tuple[InputsFile, ...]]) -> Match:
    """Match activations to the linears of a model.

    A linear has its own file, or shares that of a sibling that sees the same input (q, k, v).

    Raises:
        InputError: activations of the wrong width, or without tokens; all such are listed.
    """
    check_float(checkpoint)
    weights = {
        name.removesuffix(".weight"): stored
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and is_float(stored.spec) and len(stored.spec.shape) == 2
    }
    entries: dict[str, ActivationSite] = {}
    missing: list[str] = []
    wrong: list[str] = []
    sites = model_sites(checkpoint).sites
    turned = transposed_tensors(sites)
    widths = {
        module: stored.spec.shape[0 if stored.spec.name in turned else 1]
        for module, stored in weights.items()
    }
    for group in group_modules(weights, sites):
        named = [module for module in group if module in found]
        rest = [module for module in group if module not in found]
        if not named:
            missing += [m for m in rest if default_reason(weights[m]) is None]
            continue
        for module in named:
            linears = (module, *(rest if module == named[0] else ()))
            files = found[module]
            info = SiteInfo(module, linears, files[0].in_features, sum(f.n_tokens for f in files))
            wrong += _mistakes(info, files, weights, widths)
            entries[module] = ActivationSite(info, files)
    if wrong:
        more = f" (and {len(wrong) - 10} more)" if len(wrong) > 10 else ""
        raise InputError("; ".join(wrong[:10]) + more)
    surplus = tuple(name for name in found if name not in weights)
    return Match(entries, tuple(missing), surplus)


def _mistakes(
    info: SiteInfo,
    files: tuple[InputsFile, ...],
    weights: Mapping[str, Any],
    widths: Mapping[str, int],
) -> list[str]:
    if info.n_tokens == 0:
        return [f"{files[0].npy.path}: shape {list(files[0].npy.shape)} holds no tokens"]
    return [
        f"{files[0].npy.path}: {list(files[0].npy.shape)} has in_features {info.in_features}, but"
        f" tensor {linear + '.weight'!r} {list(weights[linear].spec.shape)} has"
        f" {widths[linear]}"
        for linear in info.linears
        if widths[linear] != info.in_features
    ]


def match_warnings(match: Match) -> tuple[str, ...]:
    """A warning about activations that fit no linear."""
    if not match.surplus:
        return ()
    names = ", ".join(match.surplus[:10])
    return (f"{len(match.surplus)} activations fit no linear of the model: {names}",)


def missing_error(match: Match, where: str) -> InputError:
    """The error for linears without activations; what is surplus is listed with them."""
    surplus = f"; left over: {', '.join(match.surplus[:10])}" if match.surplus else ""
    return InputError(
        f"{where}: no activations for {len(match.missing)} linears:"
        f" {', '.join(match.missing[:10])}{surplus}",
        hint="capture them too, or go on without them with --fallback rtn",
    )


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
    try:
        with threadpool_limits(1):
            _run_sites(source, staging, heldout, resources, listen, entries, bare)
        fisher = _stage_fisher(source, staging)
        filled = [site for site in source.sites if site in entries]
        units = [*filled, *fisher]
        tensors = [tensor for unit in units for tensor in staging.tensors(unit)]
        content = file_content(model, heldout, entries, source.fisher)
        serialize(staging.out, tensors, own_metadata(content))
        staging.publish()
    except (PtqError, OSError) as error:
        staging.give_up(error)
        raise
    finally:
        staging.close()
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
