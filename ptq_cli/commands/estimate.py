"""What a run would do, and what it would take: `--dry-run`. Nothing is written.

An `Estimate` is made from a job that is planned; `document` gives it as JSON, whose keys
dry_run.schema.json explains. Memory and disk are what the run itself states. Time is a rough count
of multiply-adds over those that this machine does in a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from ptq_cli.calibration.from_tokens import TokenSource, token_source
from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import Layer, Plan
from ptq_cli.evaluation.errors import layer_memory, statistics_bytes
from ptq_cli.evaluation.sides import Sides
from ptq_cli.plan.units import sites_of
from ptq_cli.registry import format_named, method
from ptq_cli.run import calibrate, loop
from ptq_cli.run.dequantize import Dequantization
from ptq_cli.run.output import staged_bytes
from ptq_cli.run.quantize_unit import layer_columns
from ptq_cli.run.repack import Repack
from ptq_cli.run.schedule import Resources
from ptq_cli.run.settle import Smoothing, site_memory
from ptq_cli.run.work import Quantization
from ptq_cli.run.workers import hire
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.machine import cores, memory_available, multiply_adds
from ptq_cli.storage.output import Found, Target, free_space
from ptq_cli.storage.scratch import temporary_place
from ptq_cli.storage.tokens import Tokens

PROCESS = 60 << 20  # bytes of a process before it does anything
START = 2e10  # multiply-adds: in their time imports are done, processes start, files are tidied
WRITTEN = 5e8  # bytes of the output a second, written and read back: assumed, not measured
PLAIN = 0.3  # effort (see `Method`) of a weight read, rounded to nearest, measured and packed
ELEMENTWISE = 3000  # columns whose products take as long as what is done to each weight alone


@dataclass(frozen=True)
class Piece:
    """Work that is done as a whole. tokens: behind its statistics; memory: bytes"""

    unit: str
    layers: Sequence[str]
    tokens: int
    memory: int


@dataclass(frozen=True)
class Workers:
    """Who works: processes, or where each piece needs those before it, threads of one.

    limit: bytes of the pieces in flight; beside: bytes that are taken as long as the run lasts
    """

    count: int
    limit: int
    in_order: bool = False
    beside: int = 0

    def peak(self, pieces: Sequence[Piece]) -> int:
        """Bytes at most: of the largest pieces, as many as work at once and fit the limit."""
        at_once = 1 if self.in_order else self.count
        largest = sorted((piece.memory for piece in pieces), reverse=True)[:at_once]
        together = max([min(sum(largest), self.limit), *largest[:1]])
        processes = 1 if at_once == 1 else at_once + 1
        return self.beside + together + processes * PROCESS


@dataclass(frozen=True)
class Estimate:
    """What a run takes. effort: multiply-adds; where one works alone, they count for all"""

    command: str
    checkpoint: Checkpoint
    workers: Workers
    pieces: Sequence[Piece]
    effort: float
    found: Found
    plan: Plan | None = None
    warnings: Sequence[str] = ()


def estimate_quantization(job: Quantization, target: Target, resources: Resources) -> Estimate:
    """Of a quantization, and of the smoothing before it.

    Raises:
        InputError, FileError: what the run would refuse to begin with.
    """
    plan, source = job.plan, job.source
    most = loop.workers_at_most(plan)
    workers = _workers(resources, most, source, ahead=job.looks_ahead)
    pieces, effort = [], _statistics_effort(source)
    if job.smoothing is not None and source is not None:
        how, pieces = job.smoothing, _smoothed(job.smoothing, source)
        tried = [how.rounding.how.effort, *(method(name).effort for name in how.compare)]
        alone = _rounding_effort(how.layers.values(), how.smoother.effort, *tried)
        effort += alone * (1 if job.in_sequence else workers.count)
    for unit in plan.units:
        tokens = source.sites[unit.site].n_tokens if source and unit.site else 0
        modules = [layer.module for layer in unit.layers]
        pieces.append(Piece(unit.name, modules, tokens, unit.memory))
        effort += _rounding_effort(unit.layers, 0 if unit.nearest else job.rounding.how.effort)
    scratch = job.scratch(resources.max_memory)
    found = target.look(staged_bytes(plan, resources), plan.bytes_after, scratch)
    return Estimate(
        job.command, job.checkpoint, workers, pieces, effort, found, plan, plan.warnings
    )


def _smoothed(smoothing: Smoothing, source: Source) -> list[Piece]:
    """The smoothing of each site."""
    tokens = {name: info.n_tokens for info in source.sites.values() for name in info.linears}
    pieces = []
    for site in smoothing.sites:
        modules = [linear.module for linear in site.linears]
        known = max(tokens.get(module, 0) for module in modules)
        memory = site_memory(smoothing, site)
        pieces.append(Piece(f"smoothing {site.name}", modules, known, memory))
    return pieces


def estimate_repack(job: Repack, target: Target, resources: Resources) -> Estimate:
    """Of a repacking, layer by layer in one process: each is decoded, encoded, and compared."""
    plan, layers = job.plan, job.wanted.values()
    pieces = [Piece(layer.module, [layer.module], 0, 24 * layer.size) for layer in layers]
    workers, effort = Workers(1, resources.memory, True), _rounding_effort(layers)
    found, checkpoint = target.look(plan.bytes_after, plan.bytes_after), job.folder.checkpoint
    return Estimate("pack", checkpoint, workers, pieces, effort, found, plan, plan.warnings)


def estimate_dequantization(job: Dequantization, target: Target, resources: Resources) -> Estimate:
    """Of a dequantization, tensor by tensor: codes, values as float32 and as they are written."""
    source = job.source
    decoded = [name for name in source.tensors if source.is_decoded(name)]
    pieces = [Piece(name, [name], 0, 8 * prod(source.tensors[name].spec.shape)) for name in decoded]
    size, count = sum(spec.nbytes for spec in job.specs), cores()
    workers, effort = Workers(count, resources.memory, True), 0.0
    found = target.look(0, size)
    return Estimate("dequantize", source, workers, pieces, effort, found, None, source.warnings)


def estimate_calibration(
    checkpoint: Checkpoint,
    source: Source,
    target: Target,
    resources: Resources,
    warnings: Sequence[str],
) -> Estimate:
    """Of a statistics file, site by site."""
    workers = _workers(resources, calibrate.workers_at_most(source), source)
    pieces = [
        Piece(site, info.linears, info.n_tokens, source.part_memory(site))
        for site, info in source.sites.items()
    ]
    size, effort = calibrate.statistics_bytes(source), _statistics_effort(source)
    staged = size + calibrate.parts_bytes(source, workers.count)
    found = target.look(staged, size, source.scratch(resources.max_memory))
    return Estimate("calibrate", checkpoint, workers, pieces, effort, found, None, warnings)


def estimate_evaluation(sides: Sides, tokens: Tokens | None, per_block: bool) -> Estimate:
    """Of an evaluation: each layer and its plain rounding measured; then the models on the tokens,
    the original beside two versions of it, or one more for each block."""
    source, layers = sides.source, sides.quantized.layers
    site_of, pieces, held = sites_of(layers, source), [], 0
    for module, layer in layers.items():
        site = site_of.get(module)
        n_tokens = source.sites[site].n_tokens if source and site else 0
        memory = layer_memory(layer, n_tokens)
        if source and site and source.in_sequence:  # made beside those of the site before it
            held = max(held, statistics_bytes(layer.shape[1], n_tokens))
            memory = max(memory, source.load_memory(site) + held)
        pieces.append(Piece(module, [module], n_tokens, memory))
    effort = 2 * _rounding_effort(layers.values()) + _statistics_effort(source)
    count, scratch, kept = 1, 0, 0
    if isinstance(source, TokenSource):
        scratch = source.scratch(None)
        kept = source.memory(None, None) - source.running_memory(None, None)
    if tokens is not None:
        stream = token_source(sides.original, tokens, (0, 0))
        memory = stream.running_memory(None, None) + held
        pieces.append(Piece("forward", [], int(tokens.mask.sum()), memory))
        versions = 3 + (len(stream.arch.blocks) if per_block else 0)
        count, scratch = cores(), max(scratch, versions * stream.residual_bytes)
        effort = count * effort + versions * _statistics_effort(stream)
    workers = Workers(count, memory_available(), True, kept)
    found = Found(None, None, scratch, free_space(temporary_place()), 0, scratch)
    weak = () if source is None else (f"{source.name}: {reason}" for reason in source.weak)
    warnings = list(dict.fromkeys([*weak, *(() if tokens is None else tokens.warnings)]))
    return Estimate("eval", sides.original, workers, pieces, effort, found, None, warnings)


def _workers(
    resources: Resources, most: int, source: Source | None, *, ahead: bool = False
) -> Workers:
    """Those of a run. most: how many processes are worth it; ahead: as of `Source.scratch`. Raises
    InputError: no such cluster."""
    memory = resources.memory
    if isinstance(source, TokenSource):
        beside = source.memory(resources.workers, resources.max_memory, ahead=ahead)
        return Workers(resources.crew_for(cores()), memory, True, beside)
    if resources.scheduler is not None:
        with hire(1, resources.scheduler) as crew:
            return Workers(crew.size, resources.memory_of(crew))
    return Workers(resources.crew_for(most), memory)


def _rounding_effort(layers: Iterable[Layer], *efforts: float) -> float:
    """Multiply-adds of plain rounding and of the plug-ins with these efforts."""
    squares = sum((layer.shape[1] + ELEMENTWISE) * layer.size for layer in layers)
    return (PLAIN + sum(efforts)) * squares


def _statistics_effort(source: Source | None) -> float:
    """Multiply-adds of half a Hessian for each site, and of the drift, where they are wanted. In
    sequence: of its linears, about two squares, in every model that runs."""
    if source is None:
        return 0.0
    forward = 2.0 * (1 + source.drifts) * source.in_sequence
    products = forward + 0.5 * source.hessians + (source.drifts and source.sums_drift)
    sizes = ((info.in_features, info.n_tokens) for info in source.sites.values())
    elements = 300 * (forward + 0.5 + source.drifts)
    return sum((products * n + elements) * n * n_tokens for n, n_tokens in sizes)


def document(estimate: Estimate, rate: float | None = None) -> dict[str, Any]:
    """The estimate as JSON. rate: multiply-adds of a worker in a second; None: measure it"""
    plan, workers, found = estimate.plan, estimate.workers, estimate.found
    layers, skipped = ([], ()) if plan is None else (_layers(plan), plan.skipped)
    largest = max(estimate.pieces, key=lambda piece: piece.memory, default=None)
    weights = sum(8 * row["bytes"] / row["bits_per_weight"] for row in layers)
    rate = multiply_adds(min(workers.count, cores())) if rate is None else rate
    computing = (START + estimate.effort / workers.count) / rate
    return {
        "command": estimate.command,
        "model": str(estimate.checkpoint.path),
        "output": None if found.output is None else str(found.output),
        "method": None if plan is None else plan.method,
        "format": None if plan is None else plan.format,
        "layers": layers,
        "left_alone": [asdict(entry) for entry in skipped],
        "units": [asdict(piece) for piece in estimate.pieces],
        "totals": {
            "layers": len(layers),
            "left_alone": len(skipped),
            "bits_per_weight": 8 * sum(x["bytes"] for x in layers) / weights if weights else None,
            "bytes_before": sum(x.spec.nbytes for x in estimate.checkpoint.tensors.values()),
            "bytes_after": found.final,
        },
        "memory": {
            "workers": workers.count,
            "limit": workers.limit,
            "largest_unit": None if largest is None else largest.unit,
            "largest_bytes": 0 if largest is None else largest.memory,
            "peak_bytes": workers.peak(estimate.pieces),
            "alone": [piece.unit for piece in estimate.pieces if piece.memory > workers.limit],
        },
        "disk": {"needed": found.needed, "free": found.free, "scratch": found.scratch},
        "interrupted": found.finished,
        "finished": found.complete,
        "time": {"seconds": computing + found.final / WRITTEN, "estimate": True},
        "warnings": list(estimate.warnings),
    }


def _layers(plan: Plan) -> list[dict[str, Any]]:
    """What is quantized, by what, and why by plain rounding."""
    fmt = format_named(plan.format)
    return [
        layer_columns(layer, fmt)
        | {"sym": layer.grid.sym, "reason": unit.nearest}
        | {"method": "rtn" if unit.nearest else layer.method or plan.method}
        for unit in plan.units
        for layer in unit.layers
    ]
