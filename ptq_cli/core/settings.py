"""Settings declared once: a field of a frozen dataclass becomes a command-line option, a recipe
key, a part of the run's fingerprint and a line of the documentation.

A field's metadata: `help`; `min`, `max`; `choices`; `short` (an option letter); `off` (the name of
the opposite of a flag, else `no-…`); `metavar`; `recipe_only` (no option); `shown` (the default in
the words of help); `section` (of help); `needs` (what lets it be read, plan/unused_options.py);
`check` (a function that raises InputError for a value that is none). A field of type `float | str`
is a number or one of its `words`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ptq_cli.core.text import nearest_or_all
from ptq_cli.errors import InputError

T = TypeVar("T")

_PLAIN = (bool, int, float, str)


def settings_fields(*classes: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Fields of settings classes with their types."""
    for cls in classes:
        types = _types(cls)  # type: ignore[arg-type]  # classes are hashable
        for field in dataclasses.fields(cls):
            yield field, types[field.name]


@cache
def _types(cls: type[Any]) -> dict[str, Any]:
    """The annotations of a class, which Python keeps as text, each read once."""
    return get_type_hints(cls)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field that has one."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


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


def check_keys(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse a key that nothing knows. Raises InputError that names the nearest known one."""
    for key in table:
        if key not in known:
            raise InputError(f"unknown {what} {key!r}", hint=nearest_or_all(key, known))


def _checked(field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    meta, name = field.metadata, field.name
    if kind is float and type(value) is int:
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    if "words" in meta:
        if value in meta["words"]:
            return value
        try:
            if isinstance(value, bool):
                raise TypeError
            kind, value = float, float(value)
        except (TypeError, ValueError):
            known = " or ".join(meta["words"])
            raise InputError(f"{name} = {value!r}: neither a number nor {known}") from None
    words = get_args(kind) if get_origin(kind) is Literal else ()
    mapping = get_origin(kind) is Mapping
    plain = str if words else dict if mapping else kind if kind in _PLAIN else tuple
    if type(value) is not plain or (
        kind == tuple[str, ...] and not all(isinstance(item, str) for item in value)
    ):
        wanted = "a list of strings" if kind == tuple[str, ...] else plain.__name__
        raise InputError(f"{name} = {value!r}: not {wanted}")
    choices = meta.get("choices") or words
    if choices and value not in choices:
        raise InputError(f"{name} = {value!r}", hint=f"choose one of {', '.join(choices)}")
    if ("min" in meta and not value >= meta["min"]) or ("max" in meta and not value <= meta["max"]):
        bounds = f"{meta.get('min', '')} … {meta.get('max', '')}".strip()
        raise InputError(f"{name} = {value!r}: out of range ({bounds})")
    if "check" in meta:
        meta["check"](value)
    return value


def is_amount(value: object) -> bool:
    """Whether what was read from a file is a number to work with, 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
