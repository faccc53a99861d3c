"""What a run would do, and what it would take: `--dry-run`. Nothing is written.

A `Forecast` is made from a job that is planned; `document` gives it as JSON, with an estimate of
the time from what the machine does in half a second. dry_run.schema.json states the document:

    command, model, output, method, format   output is null where the command writes none
    layers       what is quantized: layer, module, shape, bits, group_size, sym, method, reason (why
                 plain rounding, or null), bytes, bits_per_weight
    left_alone   what is copied: tensor, shape, dtype, reason
    units        pieces of work: unit, layers, tokens (behind its statistics), memory, seconds
    totals       layers, left_alone, bits_per_weight, bytes_before, bytes_after
    memory       workers, limit, largest_unit, largest_bytes, peak_bytes, alone (units above the
                 limit)
    disk         needed, free; scratch, the part of it that is gone when the run ends
    interrupted  finished units of an interrupted run that this one would go on with, or null
    finished     whether the same run has made the output already: then nothing would be done
    time         seconds, estimate (always true), machine: multiply_adds, values, calls and
                 bytes_read in a second
    warnings
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq_cli.commands.cost import total
from ptq_cli.core.layer import Layer, Plan
from ptq_cli.core.plugins import Work
from ptq_cli.registry import format_named
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.machine import cores
from ptq_cli.storage.output import check_free
from ptq_cli.storage.rates import Rates
from ptq_cli.storage.scratch import temporary_place
from ptq_cli.storage.target import Found

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
        "finished": found is not None and found.complete,
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
