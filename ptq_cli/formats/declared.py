"""How loaders find a module's name in what config.json declares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptq_cli.core.patterns import ForeignPatterns


def entries(
    modules: Sequence[str], entries: Mapping[str, Any], where: str
) -> dict[str, str | None]:
    """compressed-tensors: the entry that names each module, exactly, else as a regex, else by its
    class, else None."""
    patterns = [entry.removeprefix("re:") for entry in entries if entry.startswith("re:")]
    regex = ForeignPatterns(patterns, where)
    found: dict[str, str | None] = {}
    for module in modules:
        place = None if module in entries else regex.first(module)
        own = module if place is None else f"re:{patterns[place]}"
        found[module] = next((entry for entry in (own, "Linear") if entry in entries), None)
    return found


def left_dense(modules: Iterable[str], entries: Sequence[str]) -> Iterator[tuple[str, str]]:
    """AWQ: modules with the entry of `modules_to_not_convert` that transformers finds to match: as
    a regex from the start up to a dot, or as a suffix."""
    patterns = [rf"(?:{entry})(?:(?<=\.)|(?=\.|$))" for entry in entries]
    regex = ForeignPatterns(patterns, "modules_to_not_convert")
    for module in modules:
        place = regex.first(module)
        suffixes = [entry for entry in entries if module.endswith(entry)]
        for entry in suffixes[:1] if place is None else [entries[place]]:
            yield module, entry
