"""`allocate` as a command runs it: the plans of all choices, what is measured, the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ptq_cli.commands import job as jobs
from ptq_cli.core.names import fold_names
from ptq_cli.errors import InputError
from ptq_cli.plan.allocation import (
    Allocation,
    Budget,
    Trial,
    decide,
    divergence_of,
    is_linear,
    room,
)
from ptq_cli.plan.choices import Choice, Group, base_scheme, recipe_rules
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.run.measure_choices import ChoiceJob, measure_choices
from ptq_cli.run.schedule import RunOptions
from ptq_cli.storage.choices import ChoiceTable
from ptq_cli.storage.output import check_place


@dataclasses.dataclass(frozen=True)
class AllocateJob:
    """A budget that is planned and ready to be shared out.

    base: the recipe without what is decided
    planned: plans a recipe as its command will
    """

    command: str
    work: ChoiceJob
    choices: Mapping[str, Choice]
    settings: GridSettings
    base: Mapping[str, Any]
    budget: Budget
    table: ChoiceTable
    planned: Callable[[Mapping[str, Any]], jobs.Job]

    @property
    def cost_word(self) -> str:
        """What costs are."""
        return "predicted KL" if self.work.runs else "sum of errors"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of any recipe that it may become."""
        return self._mixture[1].plan.warnings

    @property
    def untried(self) -> tuple[str, ...]:
        """Of the warnings, as of `Plan`."""
        return self._mixture[1].plan.untried

    @property
    def default_output(self) -> str:
        """Of the recipe."""
        budget = self.budget
        bits = budget.bits_per_weight
        target = f"{budget.size}B" if bits is None else f"{bits:g}bpw"
        return f"{jobs.model_stem(self.work.checkpoint)}-{self.command}-{target}.toml"

    @cached_property
    def missing(self) -> list[Group]:
        """Groups of which something is to be measured yet."""
        return self.work.lacking(self.table)

    def run(self, options: RunOptions) -> Allocation:
        """Measure what is missing, and decide."""
        measure_choices(self.work, self.table, options.resources, options.listen)
        return self.decide(options)

    def decide(self, options: RunOptions = jobs.DEFAULTS) -> Allocation:
        """From what the table has: what fits as it is written, headers and all."""
        rest = self.rest
        while True:
            found = self._decided(rest)
            size = self.planned(self.recipe(found)).weights_bytes(options)
            if self.budget.size is None or size <= self.budget.size:
                return dataclasses.replace(found, size=size)
            rest += size - self.budget.size

    def _decided(self, rest: int) -> Allocation:
        groups = tuple(self.work.groups)
        trials, costs = self.trials(), self.costs()
        picks, points, uniform = decide(groups, self.choices, costs, self.budget, rest)
        chosen = list(zip(groups, picks, strict=True))
        size = sum(group.sizes[pick] for group, pick in chosen)
        return Allocation(
            groups=groups,
            picks=picks,
            predicted=sum(costs[group.name][pick] for group, pick in chosen),
            size=rest + size,
            bits_per_weight=8 * size / sum(group.weights for group in groups),
            points=points,
            uniform=uniform,
            runs=self.work.runs,
            bent=tuple(name for name, own in trials.items() if not is_linear(own)),
        )

    def trials(self) -> dict[str, list[Trial]]:
        """By group."""
        return {group.name: self._trials(group) for group in self.work.groups}

    def costs(self) -> dict[str, dict[str, float]]:
        """By group and choice."""
        return {group.name: self._costs(group, self._trials(group)) for group in self.work.groups}

    def _trials(self, group: Group) -> list[Trial]:
        found = self.table.divergences.get(group.name, {})
        return [
            Trial(_mean(self.table.error, group, choice), found[choice])
            for choice in self.work.tried(group)
        ]

    def _costs(self, group: Group, trials: list[Trial]) -> dict[str, float]:
        errors = {choice: _mean(self.table.error, group, choice) for choice in group.layers}
        if not self.work.runs:
            return {choice: error * len(group.modules) for choice, error in errors.items()}
        return {choice: divergence_of(error, trials) for choice, error in errors.items()}

    def recipe(self, allocation: Allocation) -> dict[str, Any]:
        """The settings that give every layer what was decided."""
        return {**self._recipe(allocation.picks), "allocation": allocation.document()}

    def _recipe(self, picks: Sequence[str]) -> dict[str, Any]:
        groups = self.work.groups
        rules = recipe_rules(groups, picks, self.choices, self.work.rounding.fmt)
        recipe = dict(self.base)
        if scheme := base_scheme(groups, picks, self.choices):
            recipe["scheme"] = scheme
        return {**recipe, "layers": [*rules, *self.settings.layers]}

    @cached_property
    def _mixture(self) -> tuple[int, jobs.Job]:
        """Of a recipe that has every choice beside the others: bytes of what is chosen, and it as
        its command plans it."""
        size, picks = 0, []
        for number, group in enumerate(self.work.groups):
            names = [name for name in self.choices if name in group.sizes]
            picks.append(names[number % len(names)])
            size += group.sizes[picks[-1]]
        return size, self.planned(self._recipe(picks))

    @cached_property
    def rest(self) -> int:
        """Bytes of weights that no choice changes, but for the lengths of headers."""
        chosen, job = self._mixture
        return job.weights_bytes() - chosen

    def check(self) -> None:
        """Find what would fail once all is measured. Raises PtqError."""
        if all(group.decided for group in self.work.groups):
            raise InputError(
                "nothing to share out: --keep and the recipe's [[layers]] say it for every layer",
                hint="leave out --config, or those [[layers]] that an earlier budget decided",
            )
        check_place(self.table.path, "--table")
        room(self.work.groups, self.budget, self.rest, sum(g.weights for g in self.work.groups))

    def check_output(self, options: RunOptions, *, named: bool) -> None:
        """Before hours of measuring, refuse an output that could not be written after them. (A run
        that has measured everything may find that it is the same.) Raises InputError, FileError.

        named: whether the output's name does not depend on what is decided
        """
        check_place(self._mixture[1].output)
        if self.missing and named:
            self._mixture[1].target(options).check_output()

    def look(self) -> dict[str, Any]:
        """What `run` would do: the choices, what they weigh and, where all is measured, what they
        cost; and how much is to be measured."""
        decided = None if self.missing else self.decide()
        uniform = {} if decided is None else decided.uniform
        weights = sum(group.weights for group in self.work.groups)
        choices = {}
        for name in self.choices:
            sizes = [group.sizes.get(name) for group in self.work.groups]
            if None in sizes:
                continue
            own = sum(size for size in sizes if size is not None)
            choices[name] = {"bits_per_weight": 8 * own / weights, "bytes": self.rest + own}
            if name in uniform:
                choices[name]["predicted"] = uniform[name][2]
        return {
            "choices": choices,
            "groups": len(self.work.groups),
            "to_measure": sum(len(group.modules) for group in self.missing),
            "trials": sum(len(self.work.tried(group)) for group in self.missing),
            "trial_tokens": self.work.trial_tokens,
            "table": str(self.table.path),
            "allocation": None if decided is None else decided.as_json(),
        }

    def about(self, allocation: Allocation) -> list[str]:
        """Comment for the recipe."""
        cost = f"{self.cost_word} {allocation.predicted:.3g}"
        what = f"{allocation.bits_per_weight:.3f} bits a weight, {cost}"
        return [f"{self.work.checkpoint.path}: {what}, by ptq allocate from {self._inputs}."]

    @property
    def _inputs(self) -> str:
        source = self.work.source
        return "the weights alone" if source is None else source.name

    def notes(self, allocation: Allocation) -> list[str]:
        """What is to be said of a decision, in lines."""
        cost = f"{self.cost_word} {allocation.predicted:.3g}"
        said = [
            f"{allocation.bits_per_weight:.3f} bits/weight, {allocation.size} bytes of weights:"
            f" {cost}"
        ]
        if not self.work.runs:
            said.append(
                "the model was not run (--tokens): the sum of relative errors was made least,"
                " whatever they cost in the predictions"
            )
        if allocation.bent:
            count = "1 group" if len(allocation.bent) == 1 else f"{len(allocation.bent)} groups"
            said.append(
                f"not in proportion to the error, and taken as its power: the KL of {count}:"
                f" {fold_names(allocation.bent)}"
            )
        return said


def _mean(error: Any, group: Group, choice: str) -> float:
    errors: list[float] = [error(module, choice) for module in group.modules]
    return sum(errors) / len(errors)
