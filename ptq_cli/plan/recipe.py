"""Recipes: TOML files whose keys are the settings' field names. Unknown keys are errors."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_cli.core.settings import check_keys, make_settings, settings_fields
from ptq_cli.core.text import printable, quoted
from ptq_cli.errors import InputError, stated_in
from ptq_cli.plan.grid_settings import (
    FLOAT_BITS,
    GRID_KEYS,
    LAYER_KEYS,
    GridSettings,
    may_stay_float,
    settings_classes,
)
from ptq_cli.plan.name_patterns import compiled
from ptq_cli.plan.tensor_types import known_type
from ptq_cli.storage.files import read_small

_WIDTH = 100


def load_recipe(path: Path, command: str) -> Mapping[str, Any]:
    """Read a recipe for a command.

    Raises:
        InputError: not TOML, an unknown key (the nearest known one is named), another command's
            recipe, a layer rule without a pattern.
    """
    content = read_small(path)
    try:
        recipe = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a TOML recipe: {error}") from None
    with stated_in(path):
        _check(recipe, command)
    return recipe


def _check(recipe: dict[str, Any], command: str) -> None:
    method = recipe.pop("method", command)
    if method != command:
        raise InputError(f"a recipe for ptq {method}", hint=f"not for ptq {command}")
    classes = settings_classes(command)
    check_keys(recipe, [field.name for field, _ in settings_fields(*classes)], "key")
    for key in ("layers", "sites"):
        rules = recipe.get(key, [])
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            raise InputError(f"{key} is not a list of tables", hint=f"write [[{key}]]")
    for rule in recipe.get("layers", []):
        _check_rule(rule)
    if recipe.get("bits") == FLOAT_BITS and not may_stay_float(command):
        raise InputError(
            f"bits = {FLOAT_BITS}: ptq {command} would have nothing to do",
            hint="leave single layers dense with [[layers]] bits = 16",
        )
    for cls in classes:
        make_settings(cls, {}, _without_floats(recipe))


def _without_floats(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table without `bits = 16`, which is out of the range of a grid."""
    return {k: v for k, v in table.items() if (k, v) != ("bits", FLOAT_BITS)}


def _check_rule(rule: Mapping[str, Any]) -> None:
    check_keys(rule, LAYER_KEYS, "key of [[layers]]")
    pattern = rule.get("match")
    if not isinstance(pattern, str):
        raise InputError("[[layers]] without match", hint='write match = "REGEX"')
    compiled(f"[[layers]] match = {pattern!r}", pattern)
    if not isinstance(rule.get("skip", False), bool):
        raise InputError(f"skip = {rule['skip']!r}: not bool")
    own = {k: v for k, v in rule.items() if k in GRID_KEYS}
    if "type" in rule:
        known_type(f"[[layers]] match = {pattern!r}", rule["type"])
    with stated_in(f"[[layers]] match = {pattern!r}"):
        make_settings(GridSettings, {}, _without_floats(own))


def recipe_text(recipe: Mapping[str, Any], method: str, about: Sequence[str]) -> str:
    """A recipe as TOML. about: lines of comment at its beginning"""
    tables = {key: value for key, value in recipe.items() if isinstance(value, Mapping)}
    lists = {key: value for key, value in recipe.items() if _is_tables(value)}
    lines = [f"# {printable(line)}" for line in about]
    lines.append(f"method = {_value(method)}")
    for key, value in recipe.items():
        if key not in tables and key not in lists:
            lines.append(f"{key} = {_value(value)}")
    for key, table in tables.items():
        lines += _table(key, table)
    for key, rules in lists.items():
        for rule in rules:
            lines += ["", f"[[{key}]]", *(f"{name} = {_value(own)}" for name, own in rule.items())]
    return "\n".join(lines) + "\n"


def _table(key: str, table: Mapping[str, Any]) -> list[str]:
    """A table, and behind it those in it."""
    lines, inner = ["", f"[{key}]"], []
    for name, value in table.items():
        if isinstance(value, Mapping):
            inner += _table(f"{key}.{name}", value)
            continue
        lines.append(f"{name} = {_value(value)}")
        if len(lines[-1]) > _WIDTH and isinstance(value, list | tuple):
            fours = (value[i : i + 4] for i in range(0, len(value), 4))
            rows = [f"    {', '.join(map(_value, own))}," for own in fours]
            lines[-1:] = [f"{name} = [", *rows, "]"]
    return [*lines, *inner]


def _is_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(x, Mapping) for x in value)


def _value(value: Any) -> str:
    """A value of TOML; regular expressions as they are, where a literal string holds them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if not isinstance(value, str):
        return repr(value)
    if "\\" in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    return quoted(value)
