"""Calibration: which activations belong to which linears, and the loop that turns them into
statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli._version import __version__
from ptq_cli.choice import check_float, default_reason, model_sites, transposed_tensors
from ptq_cli.errors import InputError, PtqError
from ptq_cli.models.sharing import group_modules
from ptq_cli.numerics.statistics import statistics_memory
from ptq_cli.progress import Listener, Progress, nobody
from ptq_cli.storage.calibration import (
    Activations,
    ActivationSite,
    NoTokens,
    PortableSource,
    SiteInfo,
    StatisticsSource,
    StreamingSource,
    file_content,
    scratch_of,
    site_entry,
    site_tensors,
)
from ptq_cli.storage.checkpoint import Checkpoint, is_float
from ptq_cli.storage.npy import InputsFile
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_bytes, own_metadata, serialize
from ptq_cli.storage.units import UnitStore
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


@dataclass(frozen=True)
class SiteJob:
    """All that a worker must know to make the statistics of one site."""

    site: str
    source: StatisticsSource
    store: UnitStore


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

    all_work, work = sum(_effort(info) for info in source.sites.values()), 0

    def done(task: Task, result: Any) -> None:
        nonlocal work
        entry, kept = result
        if entry is None:
            bare.append(task.name)
        else:
            entries[task.name] = entry
        work += _effort(source.sites[task.name])
        count, total = len(entries) + len(bare), len(source.sites)
        listen(Progress("calibrate", count, total, task.name, work, all_work, kept=kept))

    try:
        size = statistics_bytes(source, heldout)
        staging.check_space(size, size, scratch_of(source))
        with threadpool_limits(1):
            _run_sites(source, staging, resources, done)
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
    resources: Resources,
    done: Callable[[Task, Any], None],
) -> None:
    portable = isinstance(source, PortableSource)
    if isinstance(source, StreamingSource):
        work_folder = staging.folder / "stream"
        source.begin(work_folder, lambda tensor: None, resources.workers, resources.max_memory)
    tasks = []
    for site, info in source.sites.items():
        own = source.only(site) if isinstance(source, PortableSource) else source
        tasks.append(Task(site, site_memory(info), _make, SiteJob(site, own, staging.store)))
    size = resources.crew_for(workers_at_most(source)) if portable else 1
    with hire(size, resources.scheduler if portable else None) as crew:
        run_tasks(tasks, crew, resources.memory_of(crew), done, in_order=not portable)


def _make(job: SiteJob) -> Any:
    """Make and stage the statistics of one site, unless a run before this one has: what its entry
    says, or None where no token reaches it, and whether it is that run's."""
    key = {}
    if isinstance(job.source, PortableSource):
        key = {"activations": {job.site: job.source.digest(job.site)}, "version": __version__}
    if job.store.exists(job.site) and job.store.reusable(job.site, key):
        return job.store.result(job.site), True
    begin = time.perf_counter()
    try:
        statistics = job.source.load(job.site)
    except NoTokens:
        job.store.put(job.site, key, [], None)
        return None, False
    entry = site_entry(statistics)
    tensors = site_tensors(statistics)
    job.store.put(job.site, key, tensors, entry, time.perf_counter() - begin)
    return entry, False


def _effort(info: SiteInfo) -> int:
    """Multiplications of its Hessian."""
    return info.n_tokens * info.in_features**2


def workers_at_most(source: StatisticsSource) -> int:
    """How many processes are worth their start."""
    work = sum(info.n_tokens * info.in_features**2 for info in source.sites.values())
    return 1 + work // WORTH_A_PROCESS


def statistics_bytes(source: StatisticsSource, heldout: tuple[int, int]) -> int:
    """Of the file, about: Hessians and held-out inputs make it."""
    widths = [(info.in_features, info.n_tokens) for info in source.sites.values()]
    return sum(4 * n * (n + min(heldout[1], tokens) + 8) for n, tokens in widths)


def site_memory(info: SiteInfo) -> int:
    """Bytes that making a site's statistics takes: two Hessians while halves are merged, a chunk of
    inputs, and what is made of it."""
    return statistics_memory(info.in_features) + 4 * info.in_features**2


def _stage_fisher(source: StatisticsSource, staging: Staging) -> list[str]:
    """Stage the Fisher information of every module that has gradients; the units' names."""
    units = []
    for module in source.fisher:
        unit = f"{module}.fisher"
        if not staging.finished(unit):
            staging.put(unit, [as_bytes(unit, source.load_fisher(module))], None)
        units.append(unit)
    return units


def activations_source(match: Match, name: str, heldout: tuple[int, int]) -> Activations:
    return Activations(name, match.entries, heldout)
