"""What each choice costs: for unit: statistics → for choice: round → measure; and, where the model
can be run, what a few of them do to its predictions.

A unit's statistics are those of the float model. From tokens the loop goes block by block; behind a
block each group's trials, roundings of its layers at two choices, start on the way to the
predictions (calibration/trials.py). When a wave of them is on its way, or as many as fit the
memory, they are taken to the end, and what is known by then is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli.calibration.source import Place, Source
from ptq_cli.calibration.stream import Decode
from ptq_cli.calibration.streams import through_sites
from ptq_cli.calibration.trials import Changed, Trial, Trials, tokens_to_try
from ptq_cli.core.layer import Layer, Plan, Unit
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.core.report import LayerReport
from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.core.tensors import Array
from ptq_cli.errors import stated_in
from ptq_cli.models.forward.layers import Tensor
from ptq_cli.models.forward.linear import as_tensor
from ptq_cli.numerics.parallel import use_threads
from ptq_cli.plan.choices import Group
from ptq_cli.run.quantize_unit import Prepared, Rounding, prepare_unit, quantize_unit
from ptq_cli.run.schedule import Resources
from ptq_cli.run.unit_job import Weights
from ptq_cli.storage import interruption
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.choices import ChoiceTable
from ptq_cli.storage.machine import cores
from ptq_cli.storage.output import check_free, free_space
from ptq_cli.storage.scratch import temporary_folder, temporary_place

KEPT_PART = 4  # of the memory that a run may take: one in so many parts is for trials
WAVE = 32  # trials that are saved together: a run that is killed loses no more


@dataclass(frozen=True)
class ChoiceJob:
    """plans: of the whole model, by choice
    trials: the choices whose effect on the predictions is tried
    n_tokens: that they are to be tried on
    corrects_drift: whether the layers rounded later make up for what was rounded before
    """

    checkpoint: Checkpoint
    source: Source | None
    rounding: Rounding
    plans: Mapping[str, Plan]
    groups: Sequence[Group]
    trials: Sequence[str]
    n_tokens: int
    corrects_drift: bool = False

    @property
    def runs(self) -> bool:
        """Whether the model itself is run."""
        return self.source is not None and self.source.in_sequence

    @property
    def trial_tokens(self) -> int:
        """That there are to try choices on, of those asked for. Raises InputError."""
        source: Any = self.source
        return tokens_to_try(source, self.n_tokens)[1].n_tokens if self.runs else 0

    def tried(self, group: Group) -> list[str]:
        """The choices of a group that are tried."""
        if group.decided or not self.runs:
            return []
        return [choice for choice in self.trials if choice in group.layers]

    def lacking(self, table: ChoiceTable) -> list[Group]:
        """Groups of which a table does not have all that is to be known."""
        return [
            group
            for group in self.groups
            if not table.has_errors(group.modules, group.layers)
            or not table.has_divergences(group.name, self.tried(group))
        ]

    def units(self) -> dict[str, dict[str, Unit]]:
        """Units by name, each at every choice that has it, in the order of the work."""
        found: dict[str, dict[str, Unit]] = {}
        for choice, plan in self.plans.items():
            for unit in plan.units:
                found.setdefault(unit.name, {})[choice] = unit
        return found


def measure_choices(
    job: ChoiceJob, table: ChoiceTable, resources: Resources, listen: Listener = nobody
) -> None:
    """Fill the table with what it lacks."""
    interruption.work_begins(keeps=True)
    try:
        with threadpool_limits(1), use_threads(resources.crew_for(cores())):
            _Measuring(job, table, resources, listen).run()
    finally:
        interruption.work_ends()


class _Measuring:
    """A measurement under way.

    waiting: what gives the rounded tensors of the block in hand, by choice and name
    at: the site in hand, and its statistics
    """

    def __init__(
        self, job: ChoiceJob, table: ChoiceTable, resources: Resources, listen: Listener
    ) -> None:
        self.job, self.table, self.resources, self.listen = job, table, resources, listen
        self.units = job.units()
        self.waiting: dict[str, dict[str, Decode]] = {}
        self.at: tuple[str, SiteStatistics | None] = ("", None)
        self.done = 0
        self.total = len({module for group in job.groups for module in group.modules})
        self.blocks: dict[int, list[Group]] = {}
        self.places: dict[str, Place] = {}  # by linear
        if job.runs:
            places = job.source.places.values() if job.source else ()
            self.places = {linear: place for place in places for linear in place.linears}
            for group in job.groups:
                self.blocks.setdefault(self._block_of(group), []).append(group)

    def run(self) -> None:
        if not self.job.runs:
            for name, at in self.units.items():
                modules = [layer.module for unit in at.values() for layer in unit.layers]
                if not self.table.has_errors(modules, at):
                    self._unit(name, at)
                    self.table.save()
            return
        todo = {self._block_of(group) for group in self.job.lacking(self.table)}
        if todo:
            needed = self.job.source.scratch(self.resources.max_memory) if self.job.source else 0
            check_free(temporary_place(), needed, free_space(temporary_place()))
            with temporary_folder() as work:
                self._through_blocks(work, todo)

    def _through_blocks(self, work: Path, todo: set[int]) -> None:
        """for block: for unit: statistics → for choice: round; then its groups' trials."""
        source: Any = self.job.source
        limits = (self.resources.workers, self.resources.max_memory)
        self.trials = Trials(source, self.job.n_tokens, self.resources.crew_for(cores()))
        units = [at for block in sorted(todo) for _, at in self._units_of(block)]
        wanted = {str(next(iter(at.values())).site) for at in units}
        self.sites = through_sites(source, work, wanted, *limits)
        for block in range(-1, max(todo) + 1):
            for name, at in self._units_of(block) if block in todo else ():
                self._unit(name, at)
            self._try(block, todo)
        self.table.save()  # of blocks in which nothing is tried

    def _try(self, block: int, todo: set[int]) -> None:
        """Start the trials of a block, and go on through it; all to the end where there is no more
        room, or no block left that starts any."""
        changed: dict[Trial, Changed] = {}
        corrected: list[Trial] = []
        for group in self.blocks.get(block, ()) if block in todo else ():
            for choice in self.job.tried(group):
                own = (layer.tensor for layer in group.layers[choice])
                tensors = {name: self.waiting[choice][name] for name in own}
                changed[group.name, choice] = tensors
                corrected += [(group.name, choice)] if self._corrected(group) else []
        if block < 0:
            self.trials.embed(changed)
        else:
            self.trials.advance(changed, corrected)
        full = self.trials.nbytes > self.resources.memory // KEPT_PART
        if len(self.trials) and (full or len(self.trials) >= WAVE or block >= max(todo)):
            for (group_name, choice), kl in self.trials.divergences().items():
                self.table.add_divergence(group_name, choice, kl)
            self.table.save()
        self.waiting.clear()

    def _corrected(self, group: Group) -> bool:
        """Whether layers that are rounded later make up for a group."""
        n_blocks = len(self.trials.arch.blocks)
        *_, last = (linear for linear, place in self.places.items() if place.block < n_blocks)
        others = {*self.places[last].linears}.isdisjoint(group.modules)
        return self.job.corrects_drift and self._block_of(group) < n_blocks and others

    def _block_of(self, group: Group) -> int:
        """Behind the blocks for the head and what the forward does not reach, -1 for embeddings."""
        source: Any = self.job.source
        for module in group.modules:
            if module in self.places:
                return self.places[module].block
        tensors = {layer.tensor for layer in next(iter(group.layers.values()))}
        return -1 if source.arch.embedding in tensors else len(source.arch.blocks)

    def _units_of(self, block: int) -> Iterator[tuple[str, dict[str, Unit]]]:
        own = {module for group in self.blocks.get(block, ()) for module in group.modules}
        for name, at in self.units.items():
            if any(layer.module in own for layer in next(iter(at.values())).layers):
                yield name, at

    def _statistics(self, unit: Unit) -> SiteStatistics | None:
        """Of a unit's site; where the model runs, in the order of its sites."""
        if self.job.source is None or unit.site is None:
            return None
        if not self.job.runs:
            return self.job.source.load(unit.site)
        if self.at[0] != unit.site:
            self.at = next(self.sites)
        assert self.at[0] == unit.site  # units are in the order of their sites
        return self.at[1]

    def _unit(self, name: str, at: Mapping[str, Unit]) -> None:
        """Round a unit at every choice, and keep the errors."""
        first = next(iter(at.values()))
        statistics = self._statistics(first)
        if first.site is not None and statistics is None:
            at = {k: replace(unit, nearest="no token reaches it") for k, unit in at.items()}
        for _, alike in groupby(at.items(), lambda own: own[1].layers[0].grid.grouping):
            self._round(dict(alike), statistics)
        self.done += len(first.layers)
        self.listen(Progress("measure", self.done, self.total, name))

    def _round(self, at: Mapping[str, Unit], statistics: SiteStatistics | None) -> None:
        """Round a unit at choices for which it is prepared once: all of its groups of columns."""
        rounding = self.job.rounding
        prepared: Prepared | None = None
        made: dict[tuple[Layer, ...], tuple[dict[str, Array], list[LayerReport]]] = {}
        for choice, unit in at.items():
            interruption.check()
            if unit.layers not in made:
                with stated_in(unit.name):
                    prepared = prepared or prepare_unit(unit, statistics, rounding)
                    made[unit.layers] = self._quantized(unit, statistics, prepared)
            tensors, rows = made[unit.layers]
            for row in rows:
                self.table.add_error(choice, row)
            if choice in self.job.trials and self.job.runs:
                waiting = self.waiting.setdefault(choice, {})
                for layer in unit.layers:
                    own = {spec.name: tensors[spec.name] for spec in rounding.fmt.specs(layer)}
                    waiting[layer.tensor] = partial(_decoded, rounding, layer, own)

    def _quantized(
        self, unit: Unit, statistics: SiteStatistics | None, prepared: Prepared
    ) -> tuple[dict[str, Array], list[LayerReport]]:
        rounding = self.job.rounding
        with ExitStack() as files:
            weights = Weights(self.job.checkpoint, self.job.source, rounding, files)
            with weights.misfits_checked():
                return quantize_unit(unit, statistics, weights.load, rounding, prepared)


def _decoded(rounding: Rounding, layer: Layer, tensors: Mapping[str, Array]) -> Tensor:
    return as_tensor(layer, rounding.fmt.decode(layer, tensors))
