"""Settings declared once: a field of a frozen dataclass becomes a command-line option, a recipe
key, a part of the run's fingerprint and a line of the documentation.

A field's metadata: `help`; `min`, `max`; `choices`; `short` (an option letter); `off` (the name of
the opposite of a flag, else `no-…`); `metavar`; `formats` (choices are the registry's formats);
`recipe_only` (no option); `shown` (the default in the words of help). A field of type
`float | str` is a number or one of its `words`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_type_hints

import click

from ptq_cli.errors import InputError
from ptq_cli.registry import FORMATS

T = TypeVar("T")


def settings_fields(*classes: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Fields of settings classes with their types."""
    for cls in classes:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            yield field, hints[field.name]


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


def make_settings(cls: type[T], given: Mapping[str, Any], recipe: Mapping[str, Any]) -> T:
    """Settings from the command line, then the recipe, then the defaults.

    given: option values; None and () are "not given"

    Raises:
        InputError: a value of a wrong type, or out of range.
    """
    values: dict[str, Any] = {}
    for field, kind in settings_fields(cls):
        value = given.get(field.name)
        if value is None or value == ():
            value = recipe.get(field.name)
        if value is not None:
            values[field.name] = _checked(field, kind, value)
    return cls(**values)


def _number(name: str, value: Any, words: tuple[str, ...]) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} = {value!r}: neither a number nor {' or '.join(words)}") from None


def _checked(field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    meta, name = field.metadata, field.name
    if kind is float and type(value) is int:
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    if "words" in meta:
        if value in meta["words"]:
            return value
        kind, value = float, _number(name, value, meta["words"])
    plain = kind if kind in (bool, int, float, str) else tuple
    if type(value) is not plain or (
        kind == tuple[str, ...] and not all(isinstance(item, str) for item in value)
    ):
        wanted = "a list of strings" if kind == tuple[str, ...] else plain.__name__
        raise InputError(f"{name} = {value!r}: not {wanted}")
    choices = tuple(FORMATS) if meta.get("formats") else meta.get("choices")
    if choices and value not in choices:
        raise InputError(f"{name} = {value!r}", hint=f"choose one of {', '.join(choices)}")
    low, high = meta.get("min"), meta.get("max")
    out_of_range = (low is not None and not value >= low) or (
        high is not None and not value <= high
    )
    if out_of_range:
        bounds = f"{'' if low is None else low} … {'' if high is None else high}"
        raise InputError(f"{name} = {value!r}: out of range ({bounds.strip()})")
    return value
