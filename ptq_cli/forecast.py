"""What a run would do, and what it would take: `--dry-run`. Nothing is written.

A `Forecast` is made from a job that is planned; `document` gives it as JSON, with an estimate of
the time from what the machine does in half a second. dry_run.schema.json states the document:

    command, model, output, method, format   output is null where the command writes none
    layers       what is quantized: layer, module, shape, bits, group_size, sym, method, reason (why
                 plain rounding, or null), bytes_before, bytes, bits_per_weight
    left_alone   what is copied: tensor, shape, dtype, reason
    units        pieces of work: unit, layers, tokens (behind its statistics), memory, seconds
    totals       layers, left_alone, bits_per_weight, bytes_before, bytes_after
    memory       workers, limit, largest_unit, largest_bytes, peak_bytes, alone (units above the
                 limit)
    disk         needed, free; scratch, the part of it that is gone when the run ends
    interrupted  finished units of an interrupted run that this one would go on with, or null
    time         seconds, estimate (always true), machine: multiply_adds, values, calls and
                 bytes_read in a second
    warnings
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptq_cli.calibration import site_memory, statistics_bytes, workers_at_most
from ptq_cli.cost import (
    LAYER_CALLS,
    NEAREST,
    UNIT_CALLS,
    UNPACKED,
    VERIFIED,
    heldout_tokens,
    measured,
    smoothing_memory,
    smoothing_work,
    source_of,
    source_work,
    total,
    unit_work,
)
from ptq_cli.evaluation import Sides
from ptq_cli.registry import format_named, method
from ptq_cli.runner import staged_bytes
from ptq_cli.runner import workers_at_most as processes_at_most
from ptq_cli.sequential import TokenSource
from ptq_cli.smoothing import Smoothing
from ptq_cli.storage.calibration import (
    PortableSource,
    StatisticsSource,
    StreamingSource,
    scratch_of,
)
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.machine import cores, memory_available
from ptq_cli.storage.rates import Rates
from ptq_cli.storage.scratch import temporary_place
from ptq_cli.storage.staging import check_free, free_space
from ptq_cli.storage.target import Found, Target
from ptq_cli.storage.tokens import Tokens
from ptq_cli.tasks import Resources
from ptq_cli.values import Layer, Plan, Skipped, Work
from ptq_cli.work import sites_of
from ptq_cli.workers import hire

NOTHING = Work()
PROCESS = 60 << 20  # bytes of a process before it does anything
START, START_CREW = 0.7, 0.6  # seconds: imports, the last files; processes beside this one
MOVES = 4  # times that a byte of the output is written or read, until it has its name


@dataclass(frozen=True)
class Piece:
    """Work that is done as a whole. reads: bytes"""

    name: str
    layers: tuple[str, ...]
    tokens: int
    memory: int
    work: Work
    reads: int


@dataclass(frozen=True)
class Crew:
    """Who works: processes, or where each piece needs those before it, threads of one.

    beside: bytes that are taken as long as the run lasts; elsewhere: on a cluster, of which this
        machine's speed says little
    """

    workers: int
    limit: int
    in_order: bool = False
    beside: int = 0
    elsewhere: bool = False

    def peak(self, pieces: Sequence[Piece]) -> int:
        """Bytes at most: of the largest pieces, as many as work at once and fit the limit."""
        largest = sorted((piece.memory for piece in pieces), reverse=True)
        if self.in_order:
            return self.beside + max(largest, default=0) + PROCESS
        together = min(sum(largest[: self.workers]), self.limit)
        processes = self.workers if self.workers == 1 else self.workers + 1
        return self.beside + max([together, *largest[:1]]) + processes * PROCESS


@dataclass(frozen=True)
class Forecast:
    """Everything about a run but its time.

    before: what one process does first; pieces: the work on the crew; moved: bytes written and
    read again until the output has its name, after: the arithmetic in that
    """

    command: str
    checkpoint: Checkpoint
    output: Path | None
    crew: Crew
    pieces: tuple[Piece, ...]
    plan: Plan | None = None
    before: tuple[Piece, ...] = ()
    after: Work = NOTHING
    moved: int = 0
    bytes_after: int = 0
    found: Found | None = None
    scratch: int = 0
    warnings: tuple[str, ...] = ()
    nearest: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """What is read."""
        return self.checkpoint.files

    @property
    def threads(self) -> int:
        """That work at once."""
        return min(self.crew.workers, cores())


def plan_pieces(
    plan: Plan, checkpoint: Checkpoint, source: StatisticsSource | None
) -> tuple[Piece, ...]:
    """The units of a quantization."""
    how = method(plan.method)
    pieces = []
    for unit in plan.units:
        tensors = [checkpoint.tensors[layer.tensor].spec.nbytes for layer in unit.layers]
        site = None if source is None or unit.site is None else source.sites[unit.site]
        statistics = 0 if site is None else _statistics_read(source, site)
        pieces.append(
            Piece(
                unit.name,
                tuple(layer.module for layer in unit.layers),
                0 if site is None else site.n_tokens,
                unit.memory,
                unit_work(unit, how, plan.settings[1], source),
                sum(tensors) + statistics,
            )
        )
    return tuple(pieces)


def _statistics_read(source: StatisticsSource | None, site: Any) -> int:
    """Bytes read for the statistics of one site: its Hessian, or its inputs in two bytes each."""
    if isinstance(source, StreamingSource):
        return 0
    n = site.in_features
    return int(min(4 * n * n, 2 * n * site.n_tokens) if site.n_tokens else 4 * n * n)


def crew_of(
    resources: Resources, most: int, source: StatisticsSource | None, serial: bool = False
) -> Crew:
    """The crew that a run would hire; most: how many processes are worth it.

    Raises:
        InputError: the scheduler of a cluster is not there.
    """
    memory = resources.memory
    if isinstance(source, StreamingSource):
        beside = source.memory(resources.workers, resources.max_memory)
        return Crew(resources.crew_for(cores()), memory, True, beside)
    if serial or not (source is None or isinstance(source, PortableSource)):
        return Crew(1, memory, True)
    if resources.scheduler is not None:
        with hire(1, resources.scheduler) as crew:
            return Crew(crew.size, resources.memory_of(crew), elsewhere=True)
    return Crew(resources.crew_for(most), memory)


def forecast_plan(
    command: str,
    plan: Plan,
    checkpoint: Checkpoint,
    source: StatisticsSource | None,
    target: Target,
    resources: Resources,
) -> Forecast:
    """Of a quantization. Raises InputError, FileError: what the run would refuse to begin with."""
    scratch = scratch_of(source)
    return Forecast(
        command=command,
        checkpoint=checkpoint,
        output=target.output,
        crew=crew_of(resources, processes_at_most(plan), source),
        pieces=plan_pieces(plan, checkpoint, source),
        plan=plan,
        after=Work(0, VERIFIED * sum(layer.size for layer in plan.layers)),
        moved=MOVES * plan.bytes_after,
        bytes_after=plan.bytes_after,
        found=target.look(staged_bytes(plan, resources), plan.bytes_after, scratch),
        scratch=scratch,
        warnings=plan.warnings,
        nearest={x.module: u.nearest for u in plan.units if u.nearest for x in u.layers},
    )


def forecast_smoothing(
    forecast: Forecast, job: Smoothing, floats: bool, target: Target
) -> Forecast:
    """Of a smoothing, from the forecast of the rounding after it; floats: without that."""
    before = []
    for site in job.sites:
        linears, own = tuple(linear.module for linear in site.linears), source_of(job, site.linears)
        tokens = 0 if own is None else job.source.sites[own].n_tokens
        memory, work = smoothing_memory(job, site), smoothing_work(job, site)
        before.append(Piece(f"smoothing {site.name}", linears, tokens, memory, work, 0))
    forecast = replace(forecast, before=tuple(before))
    if not floats:
        return forecast
    assert forecast.plan is not None
    size = forecast.plan.bytes_before
    smooth = [
        Skipped(layer.tensor, layer.full_shape, layer.dtype, "smoothed, not rounded")
        for layer in forecast.plan.layers
    ]
    skipped = (*smooth, *forecast.plan.skipped)
    plan = replace(forecast.plan, units=(), skipped=skipped, bytes_after=size)
    found = target.look(0, size)
    return replace(
        forecast, plan=plan, pieces=(), nearest={}, after=NOTHING, moved=MOVES * size,
        bytes_after=size, found=found,
    )  # fmt: skip


def forecast_repack(
    plan: Plan, checkpoint: Checkpoint, layers: Collection[Layer], target: Target
) -> Forecast:
    """Of a repacking, layer by layer in one process: each is decoded, encoded, and compared."""
    pieces = tuple(
        Piece(
            layer.module,
            (layer.module,),
            0,
            24 * layer.size,
            Work(0, 60 * layer.size, UNIT_CALLS),
            0,
        )
        for layer in layers
    )
    return Forecast(
        command="pack",
        checkpoint=checkpoint,
        output=target.output,
        crew=Crew(1, memory_available(), True),
        pieces=pieces,
        plan=plan,
        after=Work(0, VERIFIED * sum(layer.size for layer in plan.layers)),
        moved=MOVES * plan.bytes_after,
        bytes_after=plan.bytes_after,
        found=target.look(plan.bytes_after, plan.bytes_after),
        warnings=plan.warnings,
    )


def forecast_calibration(
    checkpoint: Checkpoint,
    source: StatisticsSource,
    heldout: tuple[int, int],
    target: Target,
    resources: Resources,
    warnings: Sequence[str],
) -> Forecast:
    """Of a statistics file, site by site."""
    size, scratch = statistics_bytes(source, heldout), scratch_of(source)
    pieces = tuple(
        Piece(site, info.linears, info.n_tokens, site_memory(info), source_work(source, site),
              _statistics_read(source, info))
        for site, info in source.sites.items()
    )  # fmt: skip
    return Forecast(
        command="calibrate",
        checkpoint=checkpoint,
        output=target.output,
        crew=crew_of(resources, workers_at_most(source), source),
        pieces=pieces,
        moved=MOVES * size,
        bytes_after=size,
        found=target.look(size, size, scratch),
        scratch=scratch,
        warnings=tuple(warnings),
    )


def forecast_evaluation(sides: Sides, tokens: Tokens | None, per_block: bool) -> Forecast:
    """Of an evaluation: each layer decoded, measured, rounded to nearest and measured; then the
    models on the tokens, the original beside two versions of it, or one more for each block."""
    source, layers = sides.source, sides.quantized.layers
    site_of = sites_of(layers, source)
    seen: set[str] = set()
    pieces = []
    for layer in layers.values():
        site = site_of.get(layer.module)
        info = None if source is None or site is None else source.sites[site]
        n_tokens = 0 if info is None else info.n_tokens
        work = measured(layer, n_tokens) * 2
        work += Work(0, (NEAREST + UNPACKED) * layer.size, LAYER_CALLS)
        if source is not None and site is not None and site not in seen:
            work += source_work(source, site)
            seen.add(site)
        integers = 0 if sides.activations is None else 5 * heldout_tokens(n_tokens)
        columns = layer.shape[1] if info is not None else 0
        memory = 24 * layer.size + 8 * columns * columns + 12 * columns * heldout_tokens(n_tokens)
        reads = sides.original.tensors[layer.tensor].spec.nbytes
        work += Work(integers * layer.size)
        pieces.append(Piece(layer.module, (layer.module,), n_tokens, memory, work, reads))
    memory = memory_available()
    if tokens is None:
        return Forecast("eval", sides.original, None, Crew(1, memory, True), tuple(pieces))
    stream = TokenSource(sides.original, tokens, (0, 0))
    versions = 3 + (len(stream.arch.blocks) if per_block else 0)
    forward = total(stream.work(site) for site in stream.sites) * versions
    n_tokens = int(tokens.mask.sum())
    logits = versions * n_tokens * stream.arch.vocab_size
    head = Work(stream.arch.hidden_size, 12) * logits
    pieces.append(Piece("forward", (), n_tokens, stream.memory(None, None), forward + head, 0))
    return Forecast(
        "eval",
        sides.original,
        None,
        Crew(cores(), memory, True),
        tuple(pieces),
        scratch=versions * stream.residuals,
        found=Found(None, versions * stream.residuals, free_space(temporary_place())),
        warnings=tokens.warnings,
    )


def check(forecast: Forecast) -> None:
    """Raises FileError: less space on the disk than the run needs."""
    if forecast.found is not None:
        place = temporary_place() if forecast.output is None else forecast.output.parent
        check_free(place, forecast.found.needed, forecast.found.free)


def document(forecast: Forecast, rates: Rates) -> dict[str, Any]:
    """The forecast as JSON; the module's docstring states it."""
    plan, crew, found = forecast.plan, forecast.crew, forecast.found
    everything = (*forecast.before, *forecast.pieces)
    pieces = [_piece(piece, forecast, rates) for piece in everything]
    layers = [] if plan is None else [_layer(layer, forecast) for layer in plan.layers]
    before = sum(tensor.spec.nbytes for tensor in forecast.checkpoint.tensors.values())
    weights = sum(layer.size for layer in plan.layers) if plan is not None else 0
    packed = sum(row["bytes"] for row in layers)
    largest = max(everything, key=lambda piece: piece.memory, default=None)
    alone = Crew(1, crew.limit).peak(forecast.before)
    return {
        "command": forecast.command,
        "model": str(forecast.checkpoint.path),
        "output": None if forecast.output is None else str(forecast.output),
        "method": None if plan is None else plan.method,
        "format": None if plan is None else plan.format,
        "layers": layers,
        "left_alone": [
            {"tensor": x.tensor, "shape": list(x.shape), "dtype": x.dtype, "reason": x.reason}
            for x in (plan.skipped if plan is not None else ())
        ],
        "units": pieces,
        "totals": {
            "layers": len(layers),
            "left_alone": len(plan.skipped) if plan is not None else 0,
            "bits_per_weight": 8 * packed / weights if weights else None,
            "bytes_before": before,
            "bytes_after": forecast.bytes_after,
        },
        "memory": {
            "workers": crew.workers,
            "limit": crew.limit,
            "largest_unit": None if largest is None else largest.name,
            "largest_bytes": 0 if largest is None else largest.memory,
            "peak_bytes": max(crew.peak(forecast.pieces), alone),
            "alone": [piece.name for piece in everything if piece.memory > crew.limit],
        },
        "disk": {
            "needed": 0 if found is None else found.needed,
            "free": None if found is None else found.free,
            "scratch": forecast.scratch,
        },
        "interrupted": None if found is None else found.finished,
        "time": {
            "seconds": _seconds(forecast, rates),
            "estimate": True,
            "machine": {
                "multiply_adds": rates.products,
                "values": rates.passes,
                "calls": rates.calls,
                "bytes_read": rates.read if rates.read < float("inf") else None,
            },
        },
        "warnings": list(forecast.warnings),
    }


def _piece(piece: Piece, forecast: Forecast, rates: Rates) -> dict[str, Any]:
    """seconds: on one worker"""
    return {
        "unit": piece.name,
        "layers": list(piece.layers),
        "tokens": piece.tokens,
        "memory": piece.memory,
        "seconds": _spent(piece.work, piece.reads, rates) * forecast.threads,
    }


def _layer(layer: Layer, forecast: Forecast) -> dict[str, Any]:
    assert forecast.plan is not None
    fmt, how = format_named(forecast.plan.format), forecast.plan.method
    size = sum(spec.nbytes for spec in fmt.specs(layer))
    reason = forecast.nearest.get(layer.module)
    return {
        "layer": layer.tensor,
        "module": layer.module,
        "shape": list(layer.full_shape),
        "bits": layer.grid.bits,
        "group_size": layer.grid.group_size,
        "sym": layer.grid.sym,
        "method": "rtn" if reason else layer.method or how,
        "reason": reason,
        "bytes": size,
        "bits_per_weight": 8 * size / layer.size,
    }


def _spent(work: Work, reads: int, rates: Rates) -> float:
    """Seconds on all threads together."""
    computed = work.products / rates.products + work.passes / rates.passes
    return computed + work.calls / rates.calls + reads / rates.read


def _seconds(forecast: Forecast, rates: Rates) -> float:
    """All pieces shared among those who work; before and after them one process works alone."""
    shared = _spent(total(p.work for p in forecast.pieces), sum(p.reads for p in forecast.pieces),
                    rates)  # fmt: skip
    before = total(piece.work for piece in forecast.before)
    alone = _spent(before + forecast.after, 0, rates) * forecast.threads
    start = START + (START_CREW if forecast.crew.workers > 1 and not forecast.crew.in_order else 0)
    if forecast.crew.elsewhere:
        shared *= forecast.threads / forecast.crew.workers
    return start + shared + alone + forecast.moved / rates.read
