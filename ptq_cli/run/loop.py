"""THE loop: units in, a finished folder out.

    for unit in plan: statistics → round → prove → stage     (`work_on`, run/unit_job.py)

- All work of a run lies in `<output>.partial/` (storage/staging.py). A finished unit survives a
  kill; the same command goes on after it. It is believed only where its checksum holds and it was
  made from the same bytes and settings; a run with other settings or inputs is refused.
- A worker gets names and opens files itself, stages the unit itself, and gives back report rows.
  Any `concurrent.futures` executor serves (workers.py); schedule.py says in which order, and how
  many at once. Where each unit needs those before it, in_sequence.py has the loop.
- A smoothing is a stage before that (smooth.py).
- BLAS has one thread everywhere: its bits then depend on no thread count, and small products do
  not suffer from a shared machine. The bytes of the output depend neither on the workers, nor on an
  interruption, nor on the order of units.
- The output is assembled from the staged units, read back, compared, and renamed in one step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.calibration.source import Source, smoothed_source
from ptq_cli.core.layer import Plan, Unit
from ptq_cli.core.report import RunReport
from ptq_cli.numerics.scales import ScaleMisfit
from ptq_cli.report.report import make_report
from ptq_cli.run.calibrate import calibrate_sites
from ptq_cli.run.in_sequence import quantize_in_sequence
from ptq_cli.run.output import is_placing, lay_out, staged_bytes, write_output
from ptq_cli.run.scale_dtypes import find_scale_dtypes, found_before, with_scale_dtypes
from ptq_cli.run.schedule import RunOptions, Task, run_tasks
from ptq_cli.run.settle import Smoothing
from ptq_cli.run.smooth import smooth
from ptq_cli.run.unit_job import work_on
from ptq_cli.run.work import BackgroundCopy, Quantization, Work
from ptq_cli.run.workers import hire
from ptq_cli.storage.folded import stage_folded
from ptq_cli.storage.output import STATISTICS, Target
from ptq_cli.storage.shards import Shards
from ptq_cli.storage.staging import Staging

WORTH_A_PROCESS = 1 << 22  # weights


def quantize(job: Quantization, staging: Staging, options: RunOptions) -> RunReport:
    """Smooth, round, and give the output its name.

    Raises:
        PtqError: what a unit met; those that are finished stay in `staging`.
    """
    begin = time.perf_counter()
    with threadpool_limits(1):
        work, shards = _finished_work(job, staging, options)
        report = _report(work, time.perf_counter() - begin)
        write_output(work, report, shards)
    staging.publish()
    seconds = time.perf_counter() - begin
    return replace(report, totals={**report.totals, "seconds": seconds})


def _finished_work(
    job: Quantization, staging: Staging, options: RunOptions
) -> tuple[Work, Shards | None]:
    """All units, done; begun anew where scales turn out not to fit the dtype they are stored in."""
    found = found_before(staging)
    while True:
        planned = with_scale_dtypes(job, found)
        try:
            return _worked_through(planned, staging, options)
        except ScaleMisfit as error:
            found = find_scale_dtypes(planned, error, staging, found)


def _worked_through(
    job: Quantization, staging: Staging, options: RunOptions
) -> tuple[Work, Shards | None]:
    plan, resources = job.plan, options.resources
    scratch = job.scratch(resources.max_memory)
    staging.check_space(staged_bytes(plan, resources), plan.bytes_after, scratch)
    shards = lay_out(staging, job, options.max_shard)
    places = {} if shards is None else shards.places
    store = replace(staging.store, places=places, placing=is_placing(plan, resources))
    with BackgroundCopy(shards) as copy:
        work = Work(job, staging, store, copy, options, job.checkpoint, job.source, plan)
        _work_through(work)
    return work, shards


def _work_through(work: Work) -> None:
    """Smooth and round; beside that, tensors are copied as soon as they are what they will be."""
    smoothing = work.job.smoothing
    later = set() if smoothing is None else smoothing.tensors
    names = work.job.written
    work.copy_untouched(name for name in names if name not in later)
    if work.job.in_sequence:
        quantize_in_sequence(work)
    else:
        if smoothing is not None:
            smooth_in_any_order(work, smoothing)
        quantize_in_any_order(work)
    if work.smoothed is not None:
        rounded = {layer.tensor for layer in work.plan.layers}
        folded = work.smoothed.checkpoint
        names_left = [name for name in folded.folds if name not in rounded]
        work.checkpoint = stage_folded(folded, names_left, work.staging)
    work.copy_untouched(name for name in names if name in later)


def quantize_in_any_order(work: Work) -> None:
    """for unit in plan: statistics → round → prove → stage, on workers."""
    tasks = [Task(unit.name, unit.memory, work_on, work.unit_job(unit)) for unit in work.plan.units]

    def done(task: Task, result: Any) -> None:
        work.add(task.name, *result)

    resources = work.options.resources
    with hire(resources.crew_for(workers_at_most(work.plan)), resources.scheduler) as crew:
        run_tasks(tasks, crew, resources.memory_of(crew), done)


def workers_at_most(plan: Plan) -> int:
    """A process takes half a second to start: how many are worth it, unless asked for."""
    return 1 + sum(layer.size for layer in plan.layers) // WORTH_A_PROCESS


def smooth_in_any_order(work: Work, smoothing: Smoothing) -> None:
    """for group of sites: statistics → factors → stage; from here on everything is folded."""
    source = work.source
    if source is not None and source.in_sequence:
        source = _calibrated(source, work)
        units = tuple(_with_tokens(unit, source) for unit in work.plan.units)
        work.plan = replace(work.plan, units=units)
    assert source is not None  # the plan has seen to it
    work.smoothed = smooth(smoothing, source, work.staging, work.options.listen)
    work.source = smoothed_source(source, work.smoothed.folds)
    work.checkpoint = work.smoothed.checkpoint


def _calibrated(source: Source, work: Work) -> Source:
    """Statistics of the float model on its tokens: a file in the work folder."""
    path = work.staging.folder / STATISTICS
    if not path.exists():
        model, options = work.job.checkpoint.fingerprint, work.options
        with Staging(Target(path, {"command": "calibrate"})) as inner:
            described = replace(source, described=True)
            calibrate_sites(described, model, inner, options.listen, options.resources)
    return open_calibration(path)


def _with_tokens(unit: Unit, statistics: Source) -> Unit:
    if unit.site is None or unit.site in statistics.sites:
        return unit
    return replace(unit, site=None, nearest="no token reaches it")


def _report(work: Work, seconds: float) -> RunReport:
    rows = [work.rows[layer.module] for layer in work.plan.layers]
    weak = () if work.job.source is None else work.job.source.weak
    sites: Sequence[Mapping[str, Any]] = ()
    if work.smoothed is not None:
        rows = [work.smoothed.annotate(row) for row in rows]
        sites = work.smoothed.outcomes
    report = make_report(work.job.command, work.plan, rows, seconds, weak)
    return replace(report, sites=tuple(sites), kv_cache=work.kv_cache)
