"""A budget among a command's options, and the recipe that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq_cli.commands.allocate import AllocateJob
from ptq_cli.commands.plan_allocation import SAID_BY_CHOICES
from ptq_cli.core.settings import settings_fields
from ptq_cli.errors import InputError
from ptq_cli.plan.allocation import Allocation, Budget
from ptq_cli.plan.grid_settings import settings_classes
from ptq_cli.plan.recipe import recipe_text
from ptq_cli.storage.files import read_small, write_whole
from ptq_cli.storage.machine import parse_size
from ptq_cli.storage.output import check_place

METHODS = ("gptq", "rtn", "awq")  # that take a budget
TRIAL_TOKENS = Budget().trial_tokens
# What choices say, and what a recipe of them says nothing of: no settings of `ptq allocate`.
NO_SETTINGS = (
    *SAID_BY_CHOICES,
    *("pure", "kv_cache", "allocation"),
)
_NAMES = ("target_bpw", "target_size", "choices", "keep", "fast", "trial_tokens", "table")


def take_budget(options: dict[str, Any]) -> tuple[Budget | None, Path | None]:
    """Take a budget's options out of `options`; the budget, or None where there is no target, and
    the table.

    Raises:
        InputError: the others without a target; a size that is none.
    """
    own = {name: options.pop(name, None) for name in _NAMES}
    bits, target, table = own["target_bpw"], own["target_size"], own["table"]
    if bits is None and target is None:
        for name, value in own.items():
            if value not in (None, False, (), [], ""):
                word = name.replace("_", "-")
                raise InputError(f"--{word} does nothing without --target-bpw or --target-size")
        return None, None
    if bits is not None and target is not None:
        raise InputError("--target-bpw and --target-size exclude each other")
    budget = Budget(
        bits,
        None if target is None else parse_size(str(target)),
        _several(own["choices"]),
        _several(own["keep"]),
        bool(own["fast"]),
        own["trial_tokens"] or TRIAL_TOKENS,
    )
    return budget, None if table is None else Path(table)


def _several(words: Any) -> tuple[str, ...]:
    """Several words, or one alone."""
    return (words,) if isinstance(words, str) else tuple(words or ())


def check_recipe(job: AllocateJob, output: Path | None, *, force: bool) -> None:
    """Refuse a place where another file is before hours of measuring. (A run that has measured
    everything may find that it is the same.)"""
    path = output or Path(job.default_output)
    check_place(path)
    if job.missing and path.exists() and not force:
        raise InputError(f"{path} exists already", hint="--force replaces it")


def write_recipe(
    job: AllocateJob, allocation: Allocation, output: Path | None, *, force: bool
) -> dict[str, Any]:
    """Write the recipe of a decision; gives what was decided, with the path as `output`.

    Raises:
        InputError: another file is there, and nothing forces it.
        FileError: it cannot be written.
    """
    path = output or Path(job.default_output)
    text = recipe_text(job.recipe(allocation), job.command, job.about(allocation))
    if path.exists() and not force and read_small(path) != text.encode():
        raise InputError(f"{path} exists already", hint="--force replaces it")
    write_whole(path, text)
    return {"output": str(path), **allocation.as_json()}


def check_method(method: str, given: Mapping[str, Any]) -> None:
    """Refuse settings that a method has none of, and methods that take no budget."""
    if method not in METHODS:
        raise InputError(f"method {method!r}", hint=f"choose one of {', '.join(METHODS)}")
    known = {field.name for field, _ in settings_fields(*settings_classes(method))}
    for name in sorted(given.keys() - known):
        word = name.replace("_", "-")
        raise InputError(f"--{word} does nothing here", hint=f"ptq {method} has no such setting")
