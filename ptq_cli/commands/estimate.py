"""What a run would do, and what it would take: `--dry-run`. Nothing is written.

An `Estimate` is made from a job that is planned; `document` gives it as JSON, whose keys
dry_run.schema.json explains. Memory and disk are what the run itself states. Time is a rough count
of multiply-adds over those that this machine does in a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ptq_cli.calibration.from_tokens import TokenSource, token_source
from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import Layer, Plan
from ptq_cli.core.plugins import ELEMENTWISE, Method
from ptq_cli.evaluation.errors import Sides, layer_memory
from ptq_cli.numerics.statistics import HELDOUT_LIMIT
from ptq_cli.plan.units import sites_of
from ptq_cli.registry import format_named, method
from ptq_cli.run.calibrate import parts_bytes, statistics_bytes
from ptq_cli.run.calibrate import workers_at_most as calibrating_at_most
from ptq_cli.run.loop import workers_at_most
from ptq_cli.run.output import staged_bytes
from ptq_cli.run.quantize_unit import layer_columns
from ptq_cli.run.repack import Repack
from ptq_cli.run.schedule import Resources
from ptq_cli.run.settle import site_memory
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
HANDLED = 30 * ELEMENTWISE  # of a weight: read, rounded to nearest, packed, unpacked, compared
LOOKED_AT = 20 * ELEMENTWISE  # of an input: ranges, percentiles, sums


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
    """What a run takes.

    before: what one process does first; pieces: what all workers do then
    effort: multiply-adds; where one works alone, they count for all
    """

    command: str
    checkpoint: Checkpoint
    workers: Workers
    pieces: Sequence[Piece]
    effort: float
    found: Found
    plan: Plan | None = None
    before: Sequence[Piece] = ()
    warnings: Sequence[str] = ()


def rounding_effort(layers: Iterable[Layer], calibrated: bool, *tried: tuple[Method, Any]) -> float:
    """Multiply-adds of plain rounding and of what else is tried, each measured."""
    effort = 0.0
    for layer in layers:
        n = layer.shape[1]
        measured = HANDLED + (n + HELDOUT_LIMIT if calibrated else 0)
        each = sum(how.effort(n, layer.grid, settings) for how, settings in tried)
        effort += ((1 + len(tried)) * measured + each) * layer.size
    return effort


def statistics_effort(source: Source | None) -> float:
    """Multiply-adds of the statistics of all sites."""
    if source is None:
        return 0.0
    effort = 0.0
    for site, info in source.sites.items():
        n, values = info.in_features, source.bytes_read(site) / 2
        each = n / 2 + LOOKED_AT
        if source.in_sequence:  # linears of about two squares in each model, and the drift
            values = info.n_tokens * n
            each += (1 + source.feedback) * (2 * n + 2 * LOOKED_AT) + source.feedback * n
        effort += values * each
    return effort


def estimate_quantization(job: Quantization, target: Target, resources: Resources) -> Estimate:
    """Of a quantization, and of the smoothing before it.

    Raises:
        InputError, FileError: what the run would refuse to begin with.
    """
    plan, source = job.plan, job.source
    pieces, effort = [], statistics_effort(source)
    for unit in plan.units:
        tokens = source.sites[unit.site].n_tokens if source and unit.site else 0
        modules = [layer.module for layer in unit.layers]
        pieces.append(Piece(unit.name, modules, tokens, unit.memory))
        tried = () if unit.nearest else ((job.rounding.how, job.rounding.settings),)
        effort += rounding_effort(unit.layers, tokens > 0, *tried)
    workers = _workers(resources, workers_at_most(plan), source)
    before, alone = _smoothed(job)
    effort += alone * (1 if job.in_sequence else workers.count)
    found = target.look(staged_bytes(plan, resources), plan.bytes_after, job.scratch)
    return Estimate(
        job.command, job.checkpoint, workers, pieces, effort, found, plan, before, plan.warnings
    )


def _workers(resources: Resources, most: int, source: Source | None) -> Workers:
    """Those of a run. most: how many processes are worth it. Raises InputError: no such cluster."""
    memory = resources.memory
    if isinstance(source, TokenSource):
        beside = source.memory(resources.workers, resources.max_memory)
        return Workers(resources.crew_for(cores()), memory, True, beside)
    if resources.scheduler is not None:
        with hire(1, resources.scheduler) as crew:
            return Workers(crew.size, resources.memory_of(crew))
    return Workers(resources.crew_for(most), memory)


def _smoothed(job: Quantization) -> tuple[list[Piece], float]:
    """The smoothing of each site, and multiply-adds of all: a search, and one proposal's trial.
    Layers are rounded with and without it, and twice by each method that is compared."""
    pieces: list[Piece] = []
    if job.smoothing is None or job.source is None:
        return pieces, 0.0
    how, known = job.smoothing.settling, job.source.sites.values()
    for site in job.smoothing.sites:
        modules = [linear.module for linear in site.linears]
        tokens = next((info.n_tokens for info in known if {*modules} & {*info.linears}), 0)
        pieces.append(Piece(f"smoothing {site.name}", modules, tokens, site_memory(how, site)))
    layers = how.layers.values()
    tried = [(method(name), own) for name, own in (how.rounding, *how.compare.items())]
    effort = rounding_effort(layers, True, *tried, *tried)
    for layer in layers:
        effort += how.smoother.effort(layer.shape[1], layer.grid, how.settings) * layer.size
    return pieces, effort


def estimate_repack(job: Repack, target: Target, resources: Resources) -> Estimate:
    """Of a repacking, layer by layer in one process: each is decoded, encoded, and compared."""
    plan, layers = job.plan, job.wanted.values()
    pieces = [Piece(layer.module, [layer.module], 0, 24 * layer.size) for layer in layers]
    workers, effort = Workers(1, resources.memory, True), rounding_effort(layers, False)
    found, checkpoint = target.look(plan.bytes_after, plan.bytes_after), job.folder.checkpoint
    return Estimate("pack", checkpoint, workers, pieces, effort, found, plan, (), plan.warnings)


def estimate_calibration(
    checkpoint: Checkpoint,
    source: Source,
    target: Target,
    resources: Resources,
    warnings: Sequence[str],
) -> Estimate:
    """Of a statistics file, site by site."""
    workers = _workers(resources, calibrating_at_most(source), source)
    pieces = [
        Piece(site, info.linears, info.n_tokens, source.part_memory(site))
        for site, info in source.sites.items()
    ]
    size, effort = statistics_bytes(source), statistics_effort(source)
    staged = size + parts_bytes(source, workers.count)
    found = target.look(staged, size, source.scratch)
    return Estimate("calibrate", checkpoint, workers, pieces, effort, found, warnings=warnings)


def estimate_evaluation(sides: Sides, tokens: Tokens | None, per_block: bool) -> Estimate:
    """Of an evaluation: each layer decoded, measured, rounded to nearest and measured; then the
    models on the tokens, the original beside two versions of it, or one more for each block."""
    source, layers = sides.source, sides.quantized.layers
    site_of, pieces = sites_of(layers, source), []
    for module, layer in layers.items():
        site = site_of.get(module)
        n_tokens = source.sites[site].n_tokens if source and site else 0
        pieces.append(Piece(module, [module], n_tokens, layer_memory(layer, n_tokens)))
    effort = 2 * rounding_effort(layers.values(), source is not None) + statistics_effort(source)
    count, scratch = 1, 0
    if tokens is not None:
        stream, n_tokens = token_source(sides.original, tokens, (0, 0)), int(tokens.mask.sum())
        arch = stream.arch
        pieces.append(Piece("forward", [], n_tokens, stream.memory(None, None)))
        versions = 3 + (len(arch.blocks) if per_block else 0)
        count, scratch = cores(), versions * stream.residual_bytes
        effort = count * effort + versions * statistics_effort(stream)
        effort += versions * n_tokens * arch.vocab_size * arch.hidden_size
    workers = Workers(count, memory_available(), True)
    found = Found(None, None, scratch, free_space(temporary_place()), 0, scratch)
    warnings = () if tokens is None else tokens.warnings
    return Estimate("eval", sides.original, workers, pieces, effort, found, warnings=warnings)


def document(estimate: Estimate, rate: float | None = None) -> dict[str, Any]:
    """The estimate as JSON. rate: multiply-adds of a worker in a second; None: measure it"""
    plan, workers, found = estimate.plan, estimate.workers, estimate.found
    layers, skipped = ([], ()) if plan is None else (_layers(plan), plan.skipped)
    pieces = [*estimate.before, *estimate.pieces]
    largest = max(pieces, key=lambda piece: piece.memory, default=None)
    first = Workers(1, workers.limit).peak(estimate.before)
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
        "units": [asdict(piece) for piece in pieces],
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
            "peak_bytes": max(workers.peak(estimate.pieces), first),
            "alone": [piece.unit for piece in pieces if piece.memory > workers.limit],
        },
        "disk": {
            "needed": found.needed,
            "free": found.free,
            "scratch": found.scratch,
        },
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
