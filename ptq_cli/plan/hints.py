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
from ptq_cli.formats.common import SCALE_NAMES, SCALE_WORDS
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.schemes import scheme_grid, scheme_inputs, scheme_settings
from ptq_cli.registry import FORMATS, format_named

Unread = Callable[[Sequence[Layer], Format], Mapping[str, Misfit]]
Fits = Callable[[Sequence[Layer], Format], bool]
_SIZES = (128, 64, 32)
_ROW = "--group-size -1"
_SHOWN = 2
_ALTERNATIVES = 3  # that a regular expression may have


def helping(
    layers: Sequence[Layer],
    misfits: Mapping[str, Misfit],
    fmt: Format,
    settings: GridSettings,
    kinds: Mapping[str, str],
    unread: Unread,
) -> list[str]:
    """Options after any of which the format holds every layer, the best first.

    kinds: tensors that stay dense unless asked for, and why
    unread: gives modules that a format could hold, but that no runtime reads from it
    """

    def fits(own: Sequence[Layer], form: Format) -> bool:
        return not any(map(form.misfit, own)) and not unread(own, form)

    lost = [layer for layer in layers if layer.module in misfits]
    own = {option for misfit in misfits.values() for option in (misfit.hint or "").split(" or ")}
    options = sorted(own - {""})
    found = _options(layers, options, fmt, settings, fits)
    leaving = _leave_out(layers, lost, fmt, settings)
    asked = [layer for layer in lost if layer.tensor in kinds]
    if leaving:  # rather than whole rows as groups everywhere
        found = [option for option in found if option != _ROW]
        found.insert(0 if len(asked) == len(lost) else len(found), leaving)
    elif asked:
        others = [layer for layer in layers if layer not in asked]
        more = [""] if len(asked) == len(lost) else _options(others, options, fmt, settings, fits)
        out = f"leave {fold_names((layer.module for layer in asked), 60)} out of --include"
        found = [f"{out}{' and ' if option else ''}{option}" for option in more[:1]] + found
    return found[:_SHOWN] or _in_other_formats(layers, fmt, settings, fits)


def _options(
    layers: Sequence[Layer], own: Sequence[str], fmt: Format, settings: GridSettings, fits: Fits
) -> list[str]:
    """Single options that help, or else pairs of them; whole rows as groups come last.

    own: what the format says of layers one by one
    """
    sizes = [f"--group-size {size}" for size in _SIZES]
    single = [option for option in own if option not in (*sizes, _ROW)]
    if any(option.startswith("--group-size") for option in own):
        single = [*sizes, *single, _ROW]
    found = [option for option in single if _helps((option,), layers, fmt, settings, fits)]
    if found:
        return found
    pairs = combinations([option for option in single if not option.startswith("--format")], 2)
    return [" ".join(pair) for pair in pairs if _helps(pair, layers, fmt, settings, fits)]


def _helps(
    options: Sequence[str], layers: Sequence[Layer], fmt: Format, settings: GridSettings, fits: Fits
) -> bool:
    words = [option.partition(" ") for option in options]
    if len({word for word, _, _ in words}) < len(words):
        return False  # one option twice
    if words[0][0] == "--format":
        return words[0][2] in FORMATS and _is_held(
            layers, format_named(words[0][2]), settings, fits
        )
    if not all(word in _CHANGES for word, _, _ in words):
        return False
    found = []
    for layer in layers:
        changed = layer
        for word, _, value in words:
            changed = _CHANGES[word](changed, value)
        rules = [rule for rule in settings.layers if re.search(rule["match"], layer.tensor)]
        keys = {key for rule in rules for key in rule}  # which are stronger than options
        fixed = {key: getattr(layer.grid, key) for key in keys if hasattr(layer.grid, key)}
        found.append(replace(changed, grid=replace(changed.grid, **fixed)))
    return fits(found, fmt)


def _in_other_formats(
    layers: Sequence[Layer], fmt: Format, settings: GridSettings, fits: Fits
) -> list[str]:
    name = "compressed-tensors"
    held = fmt.name != name and _is_held(layers, format_named(name), settings, fits)
    return [f"--format {name}"] if held else []


def _is_held(layers: Sequence[Layer], fmt: Format, settings: GridSettings, fits: Fits) -> bool:
    """Whether a format holds the layers, with the scales that it wants."""
    if settings.scale_dtype == "auto":
        layers = [
            replace(layer, grid=replace(layer.grid, scale_dtype=fmt.scale_dtype(layer.dtype)))
            if layer.grid.scale_dtype in SCALE_WORDS
            else layer
            for layer in layers
        ]
    return fits(layers, fmt) and _can_declare(layers, (), fmt)


def _can_declare(layers: Sequence[Layer], dense: Sequence[str], fmt: Format) -> bool:
    try:
        fmt.config(layers, dense, AS_NAMED)
    except InputError:
        return False
    return True


def _leave_out(
    layers: Sequence[Layer], lost: Sequence[Layer], fmt: Format, settings: GridSettings
) -> str | None:
    """`--ignore REGEX` that takes out just the lost layers, and leaves each --include something."""
    unwanted = {layer.tensor for layer in lost}
    kept = [layer for layer in layers if layer.tensor not in unwanted]
    names = [layer.tensor for layer in kept]
    if not kept or not all(any(re.search(p, n) for n in names) for p in settings.include):
        return None
    if not _can_declare(kept, [layer.module for layer in lost], fmt):
        return None
    found: list[str] = []
    for layer in lost:
        if not any(re.search(pattern, layer.tensor) for pattern in found):
            patterns = _patterns(layer.module)
            found.append(next(p for p in patterns if not any(re.search(p, n) for n in names)))
    return f"--ignore {_quoted('|'.join(found))}" if len(found) <= _ALTERNATIVES else None


def _patterns(module: str) -> Iterator[str]:
    """Parts of a module's name, the first ones first, then pairs of them, then all of it."""
    parts = [part for part in module.split(".") if not part.isdecimal()]
    yield from map(re.escape, parts)
    for before, after in combinations(map(re.escape, parts), 2):
        yield f"{before}.*{after}"
    yield f"^{re.escape(module)}(\\.weight)?$"


def _quoted(pattern: str) -> str:
    return pattern if re.fullmatch(r"[\w.-]+", pattern) else f"'{pattern}'"


def _grid(key: str, kind: Callable[[str], Any] = str) -> Callable[[Layer, str], Layer]:
    return lambda layer, value: replace(layer, grid=replace(layer.grid, **{key: kind(value)}))


def _scheme(layer: Layer, name: str) -> Layer:
    grid: dict[str, Any] = {"levels": "integer", "block_rows": 1}
    if layer.grid.scale_dtype not in SCALE_WORDS:
        grid["scale_dtype"] = SCALE_NAMES.get(layer.model_dtype or layer.dtype, "float32")
    grid |= {k: v for k, v in scheme_settings(name).items() if hasattr(layer.grid, k)}
    grid |= scheme_grid(name)
    return replace(layer, grid=replace(layer.grid, **grid), activation=scheme_inputs(name))


_CHANGES: dict[str, Callable[[Layer, str], Layer]] = {
    "--group-size": _grid("group_size", int),
    "--bits": _grid("bits", int),
    "--scale-dtype": _grid("scale_dtype"),
    "--sym": lambda layer, _: replace(layer, grid=replace(layer.grid, sym=True)),
    "--act-order": lambda layer, _: replace(layer, reordered=False),
    "--activation-scheme": lambda layer, _: replace(layer, activation=Activation()),
    "--scheme": _scheme,
}
