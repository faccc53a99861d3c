"""Options that get past a refusal: each is tried on the layers before it is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import AS_NAMED, Format
from ptq_cli.errors import InputError
from ptq_cli.plan.grid_settings import SCHEME_INPUTS, SCHEMES, GridSettings
from ptq_cli.plan.select_tensors import rule_of
from ptq_cli.registry import FORMATS, format_named

_SIZES = (128, 64, 32)
_SHOWN = 2


def helping(
    layers: Sequence[Layer],
    misfits: Mapping[str, Misfit],
    fmt: Format,
    settings: GridSettings,
    kinds: Mapping[str, str],
) -> list[str]:
    """Options after any of which the format holds every layer, the best first.

    kinds: tensors that stay dense unless asked for, and why
    """
    lost = [layer for layer in layers if layer.module in misfits]
    asked = all(layer.tensor in kinds for layer in lost)
    towers = all(kinds.get(layer.tensor) == "not of the text model" for layer in lost)
    leaving = leave_out(layers, lost, settings)
    if asked and not (towers and leaving and leaving.startswith("--ignore")):
        leaving = f"leave {fold_names((layer.module for layer in lost), 60)} out of --include"
    said = [option for misfit in misfits.values() for option in (misfit.hint or "").split(" or ")]
    sizes = [f"--group-size {size}" for size in _SIZES if "--group-size" in " ".join(said)]
    row = "--group-size -1"
    others = [option for option in said if option not in (*sizes, row)]
    tried = dict.fromkeys([*sizes, *others, row])
    found = [option for option in tried if option and _helps(option, layers, fmt, settings)]
    if leaving and asked:
        found.insert(0, leaving)
    elif leaving:
        found.insert(len(found) - (row in found), leaving)
    return found[:_SHOWN]


def _helps(option: str, layers: Sequence[Layer], fmt: Format, settings: GridSettings) -> bool:
    word, _, value = option.partition(" ")
    if word == "--format":
        return value in FORMATS and _is_held(layers, format_named(value), settings)
    change = _CHANGES.get(word)
    if change is None:
        return False
    changed = []
    for layer in layers:
        own = change(layer, value)
        rule = rule_of(settings, layer.tensor)  # of a recipe, which is stronger than options
        fixed = {key: getattr(layer.grid, key) for key in rule if hasattr(layer.grid, key)}
        changed.append(replace(own, grid=replace(own.grid, **fixed)))
    return not any(map(fmt.misfit, changed))


def _is_held(layers: Sequence[Layer], fmt: Format, settings: GridSettings) -> bool:
    """Whether a format holds the layers, with the scales that it wants."""
    if settings.scale_dtype == "auto":
        layers = [
            replace(layer, grid=replace(layer.grid, scale_dtype=fmt.scale_dtype(layer.dtype)))
            for layer in layers
        ]
    if any(map(fmt.misfit, layers)):
        return False
    try:
        fmt.config(layers, [], AS_NAMED)
    except InputError:
        return False
    return True


def _grid(key: str, kind: Callable[[str], Any] = str) -> Callable[[Layer, str], Layer]:
    return lambda layer, value: replace(layer, grid=replace(layer.grid, **{key: kind(value)}))


def _scheme(layer: Layer, name: str) -> Layer:
    grid = {k: v for k, v in SCHEMES[name].items() if hasattr(layer.grid, k)}
    return replace(layer, grid=replace(layer.grid, **grid), activation=SCHEME_INPUTS.get(name))


_CHANGES: dict[str, Callable[[Layer, str], Layer]] = {
    "--group-size": _grid("group_size", int),
    "--bits": _grid("bits", int),
    "--scale-dtype": _grid("scale_dtype"),
    "--sym": lambda layer, _: replace(layer, grid=replace(layer.grid, sym=True)),
    "--act-order": lambda layer, _: replace(layer, reordered=False),
    "--activation-scheme": lambda layer, _: replace(layer, activation=Activation()),
    "--scheme": _scheme,
}


def leave_out(layers: Sequence[Layer], lost: Sequence[Layer], settings: GridSettings) -> str | None:
    """`--ignore REGEX` that takes out just the lost layers, and leaves each --include something."""
    names = {layer.tensor for layer in layers}
    unwanted = {layer.tensor for layer in lost}
    kept = names - unwanted
    if not kept or not all(any(re.search(p, n) for n in kept) for p in settings.include):
        return None
    for pattern in _patterns(lost[0].module):
        if {name for name in names if re.search(pattern, name)} == unwanted:
            return f"--ignore {_quoted(pattern)}"
    return None


def _patterns(module: str) -> Iterator[str]:
    """Parts of a module's name, the first ones first, then pairs of them, then all of it."""
    parts = [part for part in module.split(".") if not part.isdecimal()]
    yield from map(re.escape, parts)
    for before, after in combinations(map(re.escape, parts), 2):
        yield f"{before}.*{after}"
    yield re.escape(module)


def _quoted(pattern: str) -> str:
    return pattern if re.fullmatch(r"[\w.-]+", pattern) else f"'{pattern}'"
