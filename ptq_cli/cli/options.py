"""Settings declared once: a field of a frozen dataclass becomes a command-line option, a recipe
key, a part of the run's fingerprint and a line of the documentation.

A field's metadata: `help`; `min`, `max`; `choices`; `short` (an option letter); `off` (the name of
the opposite of a flag, else `no-…`); `metavar`; `formats` (choices are the registry's formats);
`recipe_only` (no option); `shown` (the default in the words of help). A field of type
`float | str` is a number or one of its `words`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import click

from ptq_cli.plan.settings import T, settings_fields
from ptq_cli.registry import FORMATS


def add_options(*classes: type[Any], defaults: Mapping[str, Any] = {}) -> Callable[[T], T]:
    """A decorator that gives a click command an option for each field.

    defaults: the command's own defaults, where they are not the fields'
    """

    def decorate(command: T) -> T:
        for field, kind in reversed(list(settings_fields(*classes))):
            if not field.metadata.get("recipe_only"):
                command = _option(field, kind, defaults)(command)
        return command

    return decorate


def _option(
    field: dataclasses.Field[Any], kind: Any, defaults: Mapping[str, Any]
) -> Callable[[Any], Any]:
    meta, word = field.metadata, field.name.replace("_", "-")
    names = [f"--{word}", field.name]
    extra: dict[str, Any] = {}
    if kind is bool:
        names[0] = f"--{word}/--{meta.get('off', 'no-' + word)}"
    elif kind == tuple[str, ...]:
        extra = {"multiple": True, "metavar": meta.get("metavar")}
    else:
        extra = {"type": _click_type(field, kind)}
    if kind is int and "choices" in meta:  # click before 8.2 has choices of words only
        extra["callback"] = lambda ctx, param, value: None if value is None else int(value)
    if "short" in meta:
        names.insert(0, meta["short"])
    default = _shown_default(field, kind, defaults.get(field.name, field.default))
    text = meta["help"] + (f"  [default: {default}]" if default else "")
    return click.option(*names, default=None, help=text, **extra)


def _click_type(field: dataclasses.Field[Any], kind: Any) -> Any:
    meta = field.metadata
    if meta.get("formats"):
        return click.Choice(list(FORMATS))
    if "choices" in meta:
        return click.Choice([str(choice) for choice in meta["choices"]])
    if kind is int:
        return click.IntRange(meta.get("min"), meta.get("max"))
    if "words" in meta:
        return click.STRING
    if kind is float:
        return click.FloatRange(meta.get("min"), meta.get("max"))
    return kind


def _shown_default(field: dataclasses.Field[Any], kind: Any, default: Any) -> str:
    if "shown" in field.metadata:
        return str(field.metadata["shown"])
    if kind is bool:
        word = field.name.replace("_", "-")
        return word if default else str(field.metadata.get("off", "no-" + word))
    return "" if default in ((), "") else str(default)
