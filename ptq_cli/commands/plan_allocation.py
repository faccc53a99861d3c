"""A budget's preparation: its choices, their plans, and the job that shares it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.calibration.find import BESIDE, AnyPath, SourceSettings, find_source
from ptq_cli.commands import job as jobs
from ptq_cli.commands.allocate import AllocateJob
from ptq_cli.commands.quantize import prepare
from ptq_cli.core.layer import Plan
from ptq_cli.core.plugins import Method
from ptq_cli.core.settings import make_settings
from ptq_cli.errors import InputError, stated_in
from ptq_cli.plan.allocation import Budget
from ptq_cli.plan.choices import Choice, check_kept, kept_rules, make_groups, read_choices
from ptq_cli.plan.grid_settings import GridSettings, default_settings
from ptq_cli.plan.plan import make_plan
from ptq_cli.plan.tensor_types import gguf_names
from ptq_cli.registry import SMOOTHERS, format_named, method, smoother
from ptq_cli.run.measure_choices import ChoiceJob
from ptq_cli.run.quantize_unit import Rounding
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.choices import SUFFIX, ChoiceTable
from ptq_cli.storage.sources import open_float

SAID_BY_CHOICES = ("bits", "scheme", "tensor_type", "output_tensor_type", "token_embedding_type")


def prepare_allocation(
    command: str,
    model: AnyPath,
    given: Mapping[str, Any],
    budget: Budget,
    recipe: Mapping[str, Any] = {},
    source: SourceSettings = BESIDE,
    *,
    table: AnyPath | None = None,
    **where: Any,
) -> AllocateJob:
    """Plan it: every mistake that can be known is found here.

    command: whose recipe it will be
    given, recipe: settings by name; `given` wins
    table: the file that keeps what is measured; beside the model, where it is not named
    where: `output`, `fallback` and `runtime`, as `prepare` takes them
    """
    _check(given, recipe, budget)
    how, own, base = _method_of(command, given, recipe, budget)
    words = [word for text in budget.choices for word in text.split(",") if word.strip()]
    named = str(given.get("format") or recipe.get("format") or "")
    choices = {c.name: c for c in read_choices(words, format_named(named or "ptq"))}
    if not named:
        base["format"] = _usual_format(choices)
    settings = make_settings(GridSettings, {}, base)
    kept = kept_rules(budget.keep, choices.values())
    settings = dataclasses.replace(settings, layers=(*settings.layers, *kept))
    checkpoint, fallback = open_float(Path(model)), where.get("fallback", "error")
    found = find_source(
        checkpoint, dataclasses.replace(source, parallel_layers=source.tokens.given)
    )
    fmt = format_named(settings.format)

    def plan(choice: Choice) -> Plan:
        grid = choice.settings(settings)
        return make_plan(checkpoint, how, grid, own, fmt, found, missing=fallback)

    plans = _plan_choices(choices, plan)
    choices = {name: choices[name] for name in plans}
    names = gguf_names(checkpoint) if fmt.container == "gguf" else {}
    check_kept(budget.keep, plans.values(), checkpoint, names)
    groups = make_groups(plans, fmt, names)
    rounding = Rounding(how.name, own, fmt.name, "rtn", settings.global_scale)
    tried = _tried(plans)
    corrects = source.in_sequence and _corrects_drift(command, base)
    work = ChoiceJob(
        checkpoint, found, rounding, plans, groups, tried, budget.trial_tokens, corrects
    )
    path = Path(table) if table is not None else _beside(checkpoint)
    measured = ChoiceTable(path, _identity(work, settings, fallback))
    planned = partial(prepare, command, model, {}, source=source, **where)
    job = AllocateJob(command, work, choices, settings, base, budget, measured, planned)
    job.check()
    return job


def _plan_choices(choices: Mapping[str, Choice], plan: Callable[[Choice], Plan]) -> dict[str, Plan]:
    """Plans by choice, by their sizes. Raises InputError of the first that cannot be, said of it
    unless it is the same with all of them."""
    plans, failed = {}, {}
    for name, choice in choices.items():
        try:
            plans[name] = plan(choice)
        except InputError as error:
            failed[name] = error
    for name, found in failed.items():
        if len(failed) == len(choices) and len({x.message for x in failed.values()}) == 1:
            raise found
        with stated_in(f"--choices {name}"):
            raise found
    by_size = sorted(plans, key=lambda name: (plans[name].bytes_after, name))
    return {name: plans[name] for name in by_size}


def _check(given: Mapping[str, Any], recipe: Mapping[str, Any], budget: Budget) -> None:
    if (budget.bits_per_weight is None) == (budget.size is None):
        raise InputError("one of --target-bpw and --target-size says the budget")
    target = budget.bits_per_weight if budget.size is None else budget.size
    if target is None or not 0 < target < float("inf"):
        raise InputError(f"{target} is no number of bits a weight or bytes")
    for name in SAID_BY_CHOICES:
        if given.get(name) or recipe.get(name):
            word = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{word} has no place beside a budget: --choices say the numbers",
                hint="--keep REGEX=CHOICE pins single layers",
            )


def _method_of(
    command: str, given: Mapping[str, Any], recipe: Mapping[str, Any], budget: Budget
) -> tuple[Method, Any, dict[str, Any]]:
    """What rounds, its settings, and the recipe's own."""
    base = {**recipe, **{k: v for k, v in given.items() if v is not None and v != ()}}
    how = method("rtn") if budget.fast else _last_method(command, base)
    return how, make_settings(how.settings, {}, {**default_settings(command), **base}), base


def _last_method(command: str, base: Mapping[str, Any]) -> Method:
    """What rounds when the recipe is run."""
    if command not in SMOOTHERS:
        return method(command)
    values = {**default_settings(command), **base}
    return method(make_settings(smoother(command).settings, {}, values).then)


def _corrects_drift(command: str, base: Mapping[str, Any]) -> bool:
    """Whether the run will make up for the layers that it has rounded before."""
    how = _last_method(command, base)
    own = make_settings(how.settings, {}, {**default_settings(command), **base})
    return how.corrects_drift(own)


def _usual_format(choices: Mapping[str, Choice]) -> str:
    """The format that choices imply."""
    rules = [choice.rule for choice in choices.values()]
    if any("type" in rule for rule in rules):
        return "gguf"
    return "compressed-tensors" if any("scheme" in rule for rule in rules) else "ptq"


def _tried(plans: Mapping[str, Plan]) -> tuple[str, ...]:
    """The choices whose effect is tried: the smallest, and that in the middle. plans: by size"""
    by_size = list(plans)
    return tuple(dict.fromkeys((by_size[0], by_size[len(by_size) // 2])))


def _identity(work: ChoiceJob, settings: GridSettings, fallback: str) -> dict[str, Any]:
    """All that what is measured depends on, besides the choice."""
    rounding = dataclasses.asdict(work.rounding)
    grid = dataclasses.asdict(settings)
    inputs = jobs.fingerprints(work.checkpoint, work.source)
    tokens = work.n_tokens if work.runs else 0
    return {
        "version": __version__,
        "inputs": inputs,
        "rounding": rounding,
        "grid": grid,
        "fallback": fallback,
        "trial_tokens": tokens,
        "corrects_drift": work.corrects_drift,
    }


def _beside(checkpoint: Checkpoint) -> Path:
    place = checkpoint.path.resolve()
    return place.with_name(f"{place.name.removesuffix('.safetensors')}{SUFFIX}")
