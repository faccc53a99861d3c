"""THE loop: units in, a finished folder out.

- All work of a run lies in `<output>.partial/` (storage/staging.py). A finished unit survives a
  kill; the same command goes on after it. It is believed only where its checksum holds and it was
  made from the same bytes and settings; a run with other settings or inputs is refused.
- A worker gets names and opens files itself, stages the unit itself, and gives back report rows.
  Any `concurrent.futures` executor serves (workers.py); tasks.py says in which order, and how many
  at once.
- BLAS has one thread everywhere: its bits then depend on no thread count, and small products do
  not suffer from a shared machine. The bytes of the output depend neither on the workers, nor on an
  interruption, nor on the order of units.
- The output is assembled from the memory-mapped units, read back, compared, and renamed in one
  step.
- A unit that fails is named; the others are finished, and then nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ptq_cli._version import __version__
from ptq_cli.calibration.source import (
    NoTokens,
    PortableSource,
    StatisticsSource,
    StreamingSource,
    scratch_of,
)
from ptq_cli.core.layer import Layer, Plan, Unit
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.core.report import LayerReport, RunReport
from ptq_cli.errors import NumericalError
from ptq_cli.models.forward.layers import Tensor
from ptq_cli.models.forward.linear import as_tensor
from ptq_cli.models.linears import dense_modules
from ptq_cli.numerics.parallel import use_threads
from ptq_cli.numerics.rounding import ScaleOverflow
from ptq_cli.registry import format_named, method
from ptq_cli.report.report import as_document, make_report, row_from_json
from ptq_cli.run.background_copy import Copying
from ptq_cli.run.nearest import Rows
from ptq_cli.run.quantize_unit import quantize_unit
from ptq_cli.run.schedule import THIS_PROCESS, Resources, Task, run_tasks
from ptq_cli.run.workers import hire
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.digest import digest_of, digest_words
from ptq_cli.storage.files import kept_buffer
from ptq_cli.storage.folder import MAX_SHARD, Assembly, begin_weights, write_folder
from ptq_cli.storage.machine import cores
from ptq_cli.storage.rows import FileRows
from ptq_cli.storage.shards import Shards
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import Bytes, as_array, as_bytes
from ptq_cli.storage.units import UnitStore

WORTH_A_PROCESS = 1 << 22  # weights


@dataclass(frozen=True)
class UnitJob:
    """All that a worker must know to do one unit: names and settings, no arrays."""

    unit: Unit
    checkpoint: Checkpoint
    source: StatisticsSource | None
    method: str
    settings: Any
    format: str
    on_failure: str
    store: UnitStore


@dataclass(frozen=True)
class After:
    """What smoothing has to say about the result, once every unit is finished.

    annotate: completes a row; sites: what it did; write: files of its own in the output folder
    checkpoint: where tensors that are not quantized are copied from; None: the run's
    """

    annotate: Callable[[LayerReport], LayerReport] = lambda row: row
    sites: tuple[Mapping[str, Any], ...] = ()
    write: Callable[[Path], None] = lambda _: None
    checkpoint: Checkpoint | None = None


def run(
    plan: Plan,
    checkpoint: Checkpoint,
    source: StatisticsSource | None,
    staging: Staging,
    *,
    command: str,
    on_failure: str = "error",
    inputs: Mapping[str, str] | None = None,
    listen: Listener = nobody,
    resources: Resources = THIS_PROCESS,
    max_shard: int = MAX_SHARD,
    after: Callable[[], After] = After,
    later: Collection[str] = (),
) -> RunReport:
    """Work through the plan and give the output its name.

    inputs: fingerprints of the inputs, for quantization.json
    max_shard: bytes of tensors in one weights file
    after: called once every unit is finished
    later: tensors that may not be copied before that

    Raises:
        PtqError: what a unit met; units that are finished stay in `staging`.
    """
    begin = time.perf_counter()
    fmt = format_named(plan.format)
    placing = is_placing(plan, resources)
    staging.check_space(staged_bytes(plan, resources), plan.bytes_after, scratch_of(source))
    layers = {layer.tensor: layer for layer in plan.layers}
    parts = [
        (layers[name].module, fmt.specs(layers[name])) if name in layers else (name, [own.spec])
        for name, own in checkpoint.tensors.items()
    ]
    of_module = {layer.module: layer for layer in plan.layers}
    shards = begin_weights(staging.weights, parts, of_module, fmt, max_shard)
    places = {} if shards is None else shards.places
    store = replace(staging.store, places=places, placing=placing)
    with threadpool_limits(1), Copying(shards) as copying:
        untouched = {name: x for name, x in checkpoint.tensors.items() if name not in layers}
        copying.put(own for name, own in untouched.items() if name not in later)
        rows = _run_units(
            plan, checkpoint, source, staging, store, on_failure, listen, resources, copying
        )
        end = after()
        if end.checkpoint is not None:
            checkpoint = end.checkpoint
        copying.put(checkpoint.tensors[name] for name in untouched if name in later)
    rows = [end.annotate(row) for row in rows]
    report = make_report(command, plan, rows, time.perf_counter() - begin)
    report = replace(report, sites=end.sites)
    _assemble(plan, checkpoint, staging, store, report, inputs or {}, shards, listen)
    end.write(staging.out)
    staging.publish()
    seconds = time.perf_counter() - begin
    return replace(report, totals={**report.totals, "seconds": seconds})


def is_placing(plan: Plan, resources: Resources) -> bool:
    """Whether units go to their places in the output's files at once. Hosts that write to one file
    of a shared file system could spoil one another's pages."""
    return format_named(plan.format).container != "gguf" and resources.scheduler is None


def staged_bytes(plan: Plan, resources: Resources) -> int:
    """Bytes of finished units that lie beside the output."""
    if is_placing(plan, resources):
        return 0
    specs = format_named(plan.format).specs
    return sum(spec.nbytes for layer in plan.layers for spec in specs(layer))


def _run_units(
    plan: Plan,
    checkpoint: Checkpoint,
    source: StatisticsSource | None,
    staging: Staging,
    store: UnitStore,
    on_failure: str,
    listen: Listener,
    resources: Resources,
    copying: Copying,
) -> list[LayerReport]:
    rows: dict[str, LayerReport] = {}
    sizes = {layer.module: layer.size for layer in plan.layers}
    total, weights, finished = len(sizes), sum(sizes.values()), 0
    if isinstance(source, StreamingSource):
        work = staging.folder / "stream"
        source.begin(work, _rounded(plan, store), resources.workers, resources.max_memory)

    def done(task: Task, result: Any) -> None:
        nonlocal finished
        entries, kept = result
        copying.put_unit(store, task.name)
        for entry in entries:
            row = row_from_json(entry)
            rows[row.module] = row
            finished += sizes[row.module]
            listen(
                Progress(
                    "quantize", len(rows), total, row.module, finished, weights, row, kept=kept
                )
            )

    tasks = []
    for unit in plan.units:
        tensors = checkpoint.part(layer.tensor for layer in unit.layers)
        statistics = source
        if isinstance(source, PortableSource):
            statistics = None if unit.site is None else source.only(unit.site)
        own = plan.settings[1]
        specs = [spec for layer in unit.layers for spec in format_named(plan.format).specs(layer)]
        places = {spec.name: store.places[spec.name] for spec in specs if store.places}
        own_store = replace(store, places=places)
        job = UnitJob(
            unit, tensors, statistics, plan.method, own, plan.format, on_failure, own_store
        )
        tasks.append(Task(unit.name, unit.memory, _work, job))
    if source is not None and not isinstance(source, PortableSource):
        threads = resources.crew_for(cores())  # each unit needs those before it
        with hire(1) as crew, use_threads(threads):
            run_tasks(tasks, crew, resources.memory_of(crew), done, in_order=True)
    else:
        with hire(resources.crew_for(workers_at_most(plan)), resources.scheduler) as crew:
            run_tasks(tasks, crew, resources.memory_of(crew), done)
    return [rows[layer.module] for layer in plan.layers]


def workers_at_most(plan: Plan) -> int:
    """A process takes half a second to start: how many are worth it, unless asked for."""
    return 1 + sum(layer.size for layer in plan.layers) // WORTH_A_PROCESS


def _work(job: UnitJob) -> Any:
    """Read, quantize and stage one unit, unless a run before this one has; its report rows, and
    whether they are that run's."""
    unit = job.unit
    if job.store.exists(unit.name) and job.store.reusable(unit.name, _key(job)):
        return job.store.result(unit.name), True
    begin = time.perf_counter()
    digests: dict[str, str] = {}
    streamed: dict[str, FileRows] = {}
    chosen = method(job.method)

    def load(layer: Layer) -> Rows:
        if chosen.is_nearest(job.settings) and job.checkpoint.streams(layer):
            streamed[layer.tensor] = rows = files.enter_context(FileRows(job.checkpoint, layer))
            return rows
        data = job.checkpoint.read_bytes(layer.tensor, kept_buffer)  # done with before the next
        digests[layer.tensor] = digest_of(data)
        return job.checkpoint.weight_rows(layer, data)

    site = unit.site
    statistics = None
    try:
        if job.source is not None and site is not None:
            statistics = job.source.load(site)
    except NoTokens:
        unit = replace(unit, nearest="no token reaches it")
    with ExitStack() as files:
        try:
            results = quantize_unit(
                unit,
                statistics,
                load,
                chosen,
                job.settings,
                format_named(job.format),
                on_failure=job.on_failure,
                importance=lambda layer: _importance(layer, job),
                outputs=job.checkpoint.output_scale,
            )
        except NumericalError as error:
            error.hint = f"{error.hint}, or allow --fallback rtn"
            raise
        except ScaleOverflow:
            for rows in streamed.values():
                rows.check()
            raise
        digests |= {name: rows.digest() for name, rows in streamed.items()}
    tensors = [
        as_bytes(name, values) for result in results for name, values in result.tensors.items()
    ]
    entries = [asdict(result.row) for result in results]
    seconds = time.perf_counter() - begin
    job.store.put(unit.name, _key(job, digests), tensors, entries, seconds)
    return entries, False


def _key(job: UnitJob, digests: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a finished unit must have been made from to be taken over.

    digests: of the tensors, where they were read already
    """
    if digests is None:
        names = [layer.tensor for layer in job.unit.layers]
        digests = {name: digest_of(job.checkpoint.read_bytes(name)) for name in names}
    unit, site = replace(job.unit, memory=0), job.unit.site
    words = (__version__, repr(unit), job.method, repr(job.settings), job.format, job.on_failure)
    return {
        "tensor": dict(digests),
        "statistics": job.source.digest(site)
        if site is not None and isinstance(job.source, PortableSource)
        else None,
        "settings": digest_words(*words),
    }


def _rounded(plan: Plan, store: UnitStore) -> Callable[[str], Tensor | None]:
    """What a layer's tensor decodes to, once its unit is finished."""
    fmt = format_named(plan.format)
    place = {layer.tensor: (unit, layer) for unit in plan.units for layer in unit.layers}

    def rounded(tensor: str) -> Tensor | None:
        if tensor not in place or not store.exists(place[tensor][0].name):
            return None
        unit, layer = place[tensor]
        wanted = {spec.name for spec in fmt.specs(layer)}
        staged = store.tensors(unit.name)
        tensors = {t.spec.name: as_array(t) for t in staged if t.spec.name in wanted}
        return as_tensor(layer, fmt.decode(layer, tensors))

    return rounded


def _importance(layer: Layer, job: UnitJob) -> NDArray[np.float32] | None:
    """What weighs the layer's scale search: its Fisher information, where that is asked for."""
    if job.source is None or getattr(job.settings, "weight", "hessian") != "fisher":
        return None
    values = job.source.load_fisher(layer.module)
    values = values.reshape(layer.shape[::-1]).T if layer.transposed else values
    return np.ascontiguousarray(values).reshape(layer.shape)


def _assemble(
    plan: Plan,
    checkpoint: Checkpoint,
    staging: Staging,
    store: UnitStore,
    report: RunReport,
    inputs: Mapping[str, str],
    shards: Shards | None,
    listen: Listener,
) -> None:
    fmt = format_named(plan.format)
    methods = {row.module: row.method for row in report.rows}
    layers = {layer.module: replace(layer, method=methods[layer.module]) for layer in plan.layers}
    of_tensor = {layer.tensor: layer for layer in layers.values()}
    staged: Mapping[str, Bytes | StoredTensor]
    if shards is not None:
        staged = shards.places  # where all is by now
    else:
        units = (store.tensors(unit.name) for unit in plan.units)
        staged = {tensor.spec.name: tensor for tensors in units for tensor in tensors}
    parts: list[tuple[str, list[Bytes | StoredTensor]]] = []
    for name, own in checkpoint.tensors.items():
        layer = of_tensor.get(name)
        if layer is None:
            parts.append((name, [own]))
        else:
            parts.append((layer.module, [staged[spec.name] for spec in fmt.specs(layer)]))
    dense = dense_modules(plan.skipped)
    documents = {
        "report.json": as_document(report, times=False),
        "quantization.json": quantization_document(plan, report.settings, inputs, layers.values()),
    }
    assembly = Assembly(parts, layers, dense, fmt, documents)
    write_folder(staging.out, assembly, checkpoint, shards=shards, listen=listen)


def quantization_document(
    plan: Plan,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    layers: Sequence[Layer] | Any,
) -> dict[str, Any]:
    """quantization.json: enough to know, and to repeat, what was done."""
    return {
        "ptq": __version__,
        "method": plan.method,
        "format": plan.format,
        "settings": dict(settings),
        "inputs": dict(inputs),
        "layers": {layer.module: layer.method for layer in layers},
    }
