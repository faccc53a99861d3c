"""Recipes: TOML files whose keys are the settings' field names. Unknown keys are errors."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.options import settings_fields
from ptq_cli.plan import LAYER_KEYS, GridSettings
from ptq_cli.storage.files import MAX_JSON, named, regular_file


def load_recipe(path: Path, command: str, classes: Iterable[type[Any]]) -> Mapping[str, Any]:
    """Read a recipe for a command whose settings are `classes`.

    Raises:
        InputError: not TOML, an unknown key (the nearest known one is named), another command's
            recipe, a layer rule without a pattern.
    """
    if regular_file(path) > MAX_JSON:
        raise InputError(f"{path}: too large for a recipe")
    with named(path):
        content = path.read_bytes()
    try:
        recipe = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a TOML recipe: {error}") from None
    method = recipe.pop("method", command)
    if method != command:
        raise InputError(f"{path}: a recipe for ptq {method}", hint=f"not for ptq {command}")
    known = [field.name for field, _ in settings_fields(*classes)]
    _check_keys(path, recipe, known, "key")
    rules = recipe.get("layers", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise InputError(f"{path}: layers is not a list of tables", hint="write [[layers]]")
    for rule in rules:
        _check_keys(path, rule, LAYER_KEYS, "key of [[layers]]")
        _check_rule(path, rule)
    return recipe


def _check_keys(path: Path, table: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise InputError(f"{path}: unknown {what} {key!r}", hint=hint)


def _check_rule(path: Path, rule: Mapping[str, Any]) -> None:
    from ptq_cli.options import make_settings

    if not isinstance(rule.get("match"), str):
        raise InputError(f"{path}: [[layers]] without match", hint='write match = "REGEX"')
    if not isinstance(rule.get("skip", False), bool):
        raise InputError(f"{path}: skip = {rule['skip']!r}: not bool")
    try:
        make_settings(GridSettings, {}, {k: v for k, v in rule.items() if k in LAYER_KEYS[1:-1]})
    except InputError as error:
        raise InputError(f"{path}: [[layers]] match = {rule['match']!r}: {error.message}") from None
