"""Forecasts of every kind of job: what its pieces are, and what each takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ptq_cli.calibration.from_tokens import TokenSource
from ptq_cli.calibration.source import Source
from ptq_cli.calibration.streams import Forward
from ptq_cli.commands.cost import (
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
from ptq_cli.commands.forecast import MOVES, Crew, Forecast, Piece
from ptq_cli.core.layer import Layer, Plan
from ptq_cli.core.plugins import Work
from ptq_cli.core.statistics import SiteInfo
from ptq_cli.evaluation.errors import Sides
from ptq_cli.plan.units import sites_of
from ptq_cli.registry import method
from ptq_cli.run.calibrate import parts_bytes, statistics_bytes, workers_at_most
from ptq_cli.run.loop import workers_at_most as processes_at_most
from ptq_cli.run.output import staged_bytes
from ptq_cli.run.schedule import Resources
from ptq_cli.run.work import Quantization
from ptq_cli.run.workers import hire
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.machine import cores, memory_available
from ptq_cli.storage.output import free_space
from ptq_cli.storage.scratch import temporary_place
from ptq_cli.storage.target import Found, Target
from ptq_cli.storage.tokens import Tokens


def plan_pieces(plan: Plan, checkpoint: Checkpoint, source: Source | None) -> tuple[Piece, ...]:
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


def _statistics_read(source: Source | None, site: SiteInfo) -> int:
    return 0 if source is None else source.bytes_read(site.site)


def crew_of(resources: Resources, most: int, source: Source | None) -> Crew:
    """The crew that a run would hire; most: how many processes are worth it.

    Raises:
        InputError: the scheduler of a cluster is not there.
    """
    memory = resources.memory
    if source is not None and source.in_sequence:
        beside = source.memory(resources.workers, resources.max_memory)
        return Crew(resources.crew_for(cores()), memory, True, beside)
    if resources.scheduler is not None:
        with hire(1, resources.scheduler) as crew:
            return Crew(crew.size, resources.memory_of(crew), elsewhere=True)
    return Crew(resources.crew_for(most), memory)


def forecast_plan(
    command: str,
    plan: Plan,
    checkpoint: Checkpoint,
    source: Source | None,
    target: Target,
    resources: Resources,
) -> Forecast:
    """Of a quantization. Raises InputError, FileError: what the run would refuse to begin with."""
    scratch = 0 if source is None else source.scratch
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


def forecast_smoothing(forecast: Forecast, job: Quantization) -> Forecast:
    """Of a smoothing, from the forecast of the rounding after it."""
    before = []
    assert job.smoothing is not None
    assert job.source is not None
    settling = job.smoothing.settling
    for site in job.smoothing.sites:
        linears = tuple(linear.module for linear in site.linears)
        own = source_of(job.source, site.linears)
        tokens = 0 if own is None else job.source.sites[own].n_tokens
        memory, work = smoothing_memory(settling, site), smoothing_work(settling, job.source, site)
        before.append(Piece(f"smoothing {site.name}", linears, tokens, memory, work, 0))
    return replace(forecast, before=tuple(before))


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
    source: Source,
    heldout: tuple[int, int],
    target: Target,
    resources: Resources,
    warnings: Sequence[str],
) -> Forecast:
    """Of a statistics file, site by site."""
    size, scratch = statistics_bytes(source, heldout), 0 if source is None else source.scratch
    crew = crew_of(resources, workers_at_most(source), source)
    pieces = tuple(
        Piece(site, info.linears, info.n_tokens, source.part_memory(site),
              source_work(source, site), _statistics_read(source, info))
        for site, info in source.sites.items()
    )  # fmt: skip
    return Forecast(
        command="calibrate",
        checkpoint=checkpoint,
        output=target.output,
        crew=crew,
        pieces=pieces,
        moved=MOVES * size,
        bytes_after=size,
        found=target.look(size + parts_bytes(source, heldout, crew.workers), size, scratch),
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
    stream = TokenSource(Forward(sides.original, tokens, (0, 0)))
    versions = 3 + (len(stream.forward.arch.blocks) if per_block else 0)
    forward = total(source_work(stream, site) for site in stream.sites) * versions
    n_tokens = int(tokens.mask.sum())
    logits = versions * n_tokens * stream.forward.arch.vocab_size
    head = Work(stream.forward.arch.hidden_size, 12) * logits
    pieces.append(Piece("forward", (), n_tokens, stream.memory(None, None), forward + head, 0))
    return Forecast(
        "eval",
        sides.original,
        None,
        Crew(cores(), memory, True),
        tuple(pieces),
        scratch=versions * stream.forward.residual_bytes,
        found=Found(None, versions * stream.forward.residual_bytes, free_space(temporary_place())),
        warnings=tokens.warnings,
    )
