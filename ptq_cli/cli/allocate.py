"""`ptq allocate`: the best mix of widths for a size, as a recipe; and the same options on the
quantizing commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ptq_cli.calibration.find import take_source
from ptq_cli.cli import console
from ptq_cli.cli import shared_options as shared
from ptq_cli.cli.common import check_path, emit_warnings, show_next
from ptq_cli.cli.next_steps import after_allocation
from ptq_cli.cli.options import Command, in_section, option, setting_options
from ptq_cli.cli.progress import Follow
from ptq_cli.commands.allocate import AllocateJob
from ptq_cli.commands.budget import (
    METHODS,
    NO_SETTINGS,
    TRIAL_TOKENS,
    check_method,
    check_recipe,
    take_budget,
    write_recipe,
)
from ptq_cli.commands.job import take_run_options
from ptq_cli.commands.plan_allocation import prepare_allocation
from ptq_cli.core.settings import settings_fields
from ptq_cli.core.text import number, size
from ptq_cli.plan.allocation import Allocation, Budget
from ptq_cli.plan.grid_settings import settings_classes
from ptq_cli.plan.recipe import load_recipe
from ptq_cli.run.schedule import RunOptions

BUDGET = in_section(
    "Numbers",
    option(
        "--target-bpw",
        type=click.FloatRange(0, min_open=True),
        metavar="X",
        help="Share out X bits a weight, scales included, among the layers: each gets one of"
        " --choices, so that the predictions suffer least.",
    ),
    option(
        "--target-size",
        metavar="SIZE",
        help="The same for weights files of SIZE at most, like 3.9GiB.",
    ),
    option(
        "--choices",
        multiple=True,
        metavar="A,B,…",
        help="What a layer may get: W2A16 … W8A16, schemes of small floats, or GGUF's types."
        "  [default: W2A16,W3A16,W4A16,W5A16,W6A16; gguf: Q2_K,Q3_K,Q4_K,Q5_K,Q6_K]",
    ),
    option(
        "--keep",
        multiple=True,
        metavar="REGEX=CHOICE",
        help="Layers whose names hold REGEX get CHOICE in any case; may be repeated.",
    ),
    option(
        "--fast",
        is_flag=True,
        help="Measure the choices' errors by rounding to nearest, not by the method.",
    ),
    option(
        "--trial-tokens",
        type=click.IntRange(1),
        metavar="N",
        help="Tokens that the choices' effect on the predictions is tried on, in sequences of 256."
        f"  [default: {TRIAL_TOKENS}]",
    ),
    option(
        "--table",
        type=shared.FILE,
        help="Where what is measured is kept, so that another target costs seconds."
        "  [default: <model>.choices.json beside MODEL]",
    ),
)
_RECIPE, _METHOD, _CONFIG = in_section(
    "Output",
    option(
        "-o",
        "--output",
        type=shared.FILE,
        help="The recipe.  [default: <model>-<method>-<bits>bpw.toml, in the current folder]",
    ),
    option(
        "--method",
        type=click.Choice(METHODS),
        default="gptq",
        show_default=True,
        help="Whose recipe it is, and by which errors are measured.",
    ),
    option(
        "--config", type=shared.FILE, help="A recipe (TOML) to start from; options win over it."
    ),
)


def _parameters() -> list[click.Parameter]:
    grid, own = settings_classes("gptq")
    settings = [
        *setting_options("Numbers", grid, defaults={"format": "by the choices"}),
        *setting_options("Method", own),
    ]
    settings = [x for x in settings if x.name not in NO_SETTINGS]
    sources = [*shared.TOKENS, shared.MIN_EXPERT_TOKENS, *shared.SOURCES, shared.IMATRIX]
    run = [x for x in (*shared.RUN, *shared.RESOURCES) if x.name not in ("scheduler",)]
    writing = [_RECIPE, shared.REPLACING[0]]
    chosen = [_METHOD, *BUDGET, _CONFIG]
    return [
        shared.path_argument("model"),
        *writing,
        *chosen,
        *settings,
        *sources,
        *run,
        shared.JSON,
    ]


@click.command("allocate", cls=Command, params=_parameters())
def allocate(model: Path, **options: Any) -> None:
    """Share out a size among MODEL's layers, and write the recipe.

    Each layer, rounded as each of --choices has it, is measured once; with --tokens the model is
    run, and what an error at each place costs in its predictions is tried, too (KL divergence).
    Then each layer gets the choice with which the sum of all is least and fits. What a runtime
    fuses gets the same: q, k and v; gate and up; all experts of a block.

    \b
    ptq allocate model/ --tokens tokens.npy --target-bpw 4.25
    ptq gptq model/ --tokens tokens.npy --config model-gptq-4.25bpw.toml
    ptq allocate model/ --tokens tokens.npy --target-size 3.9GiB \\
      --choices Q3_K,Q4_K,Q5_K,Q6_K -o recipe.toml
    """
    method = options.pop("method")
    budget, table = take_budget(options)
    if budget is None:
        raise click.UsageError("--target-bpw or --target-size says how much there is to share out")
    job = _job(method, model, options, budget, table)
    how = take_run_options(options)
    emit_warnings(job.warnings, options["strict"], job.untried)
    if options["dry_run"]:
        show_choices(job, options["as_json"])
        return
    check_path(options["output"], (".toml",), "a recipe")
    check_recipe(job, options["output"], force=how.force)
    allocation = measured(job, how, options["quiet"])
    document = write_recipe(job, allocation, options["output"], force=how.force)
    if options["as_json"]:
        console.print_json(document)
        return
    show_allocation(job, allocation)
    console.line(f"written: {document['output']}")
    show_next([after_allocation(model, method, Path(document["output"]), options)])


def _job(
    method: str, model: Path, options: dict[str, Any], budget: Budget, table: Path | None
) -> AllocateJob:
    path = options["config"]
    recipe = {} if path is None else load_recipe(path, method)
    names = [field.name for field, _ in settings_fields(*settings_classes("gptq"))]
    given = {name: options[name] for name in names if options.get(name) not in (None, ())}
    check_method(method, given)
    source = take_source(dict(options))
    return prepare_allocation(method, model, given, budget, recipe, source, table=table)


def measured(job: AllocateJob, options: RunOptions, quiet: bool) -> Allocation:
    """Measure what is missing, with progress, and decide."""
    with Follow("allocate", quiet) as listen:
        return job.run(replace(options, listen=listen))


def show_choices(job: AllocateJob, as_json: bool) -> None:
    """`--dry-run`: the choices, what they weigh, and what is to be measured."""
    document = job.look()
    if as_json:
        console.print_json(document)
        return
    if not job.missing:
        show_allocation(job, job.decide())
        console.line(f"measured already: {document['table']}")
    else:
        rows = [
            [name, f"{own['bits_per_weight']:.2f}", size(own["bytes"])]
            for name, own in document["choices"].items()
        ]
        console.table(("all layers", "bits/weight", "size"), rows)
        trials = f", {document['trials']} trials on {document['trial_tokens']} tokens"
        console.line(
            f"to measure: {document['to_measure']} layers at {len(job.choices)} choices"
            f"{trials if document['trials'] else ''}; kept in {document['table']}"
        )
    console.line("dry run: nothing was written")


def show_allocation(job: AllocateJob, allocation: Allocation) -> None:
    """What each choice alone would cost, what was decided, and how many layers got what."""
    counts = Counter[str]()
    for group, pick in zip(allocation.groups, allocation.picks, strict=True):
        counts[pick] += len(group.modules)
    rows = [
        [name, f"{bits:.2f}", size(count), number(cost), str(counts[name])]
        for name, (bits, count, cost) in allocation.uniform.items()
    ]
    chosen = [f"{allocation.bits_per_weight:.2f}", size(allocation.size)]
    rows.append(["allocated", *chosen, number(allocation.predicted), str(counts.total())])
    console.table(("all layers", "bits/weight", "size", job.cost_word, "layers"), rows)
    for line in job.notes(allocation):
        console.line(line)


def allocated_recipe(
    name: str,
    model: Path,
    options: dict[str, Any],
    given: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> Mapping[str, Any] | None:
    """The recipe of the budget that a quantizing command is given; None where nothing is to be
    done now: `--dry-run`."""
    budget, table = take_budget(options)
    if budget is None:
        return recipe
    own, fallback = dict(options), options.get("fallback", "error")
    source = take_source(own)
    job = prepare_allocation(
        name, model, given, budget, recipe, source, fallback=fallback, table=table,
        output=options["output"], runtime=options["runtime"],
    )  # fmt: skip
    if options["strict"]:
        emit_warnings(job.warnings, strict=True, untried=job.untried)
    if options["dry_run"] and job.missing:
        show_choices(job, options["as_json"])
        return None
    how = take_run_options(own)
    job.check_output(how, named=options["output"] is not None)
    allocation = measured(job, how, options["quiet"])
    for line in job.notes(allocation):
        console.say("note", line)
    return job.recipe(allocation)
