"""Pieces of HTML, and what a module's name says. Whatever comes from a report goes through
`escaped`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ptq_cli.core.text import printable
from ptq_cli.report.report import JsonObject

_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")


def escaped(value: object) -> str:
    """Text for HTML, in an element or a quoted attribute, unprintable characters shown."""
    return escape(printable(str(value)), quote=True)


def details(title: str, content: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{content}</details>"


def section(title: str, content: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>\n{content}\n</section>" if content else ""


def kind_of(module: str) -> str:
    """`model.layers.3.self_attn.q_proj` is a `q`; an expert's `gate_proj` an `expert gate`."""
    parts = module.split(".")
    last = parts[-1].removesuffix("_proj") or parts[-1]
    if last.isdigit() and len(parts) > 1:
        last = ".".join(parts[-2:])
    return f"expert {last}" if "experts" in parts else last


def depth_of(module: str) -> int | None:
    """The block's number: the first number in the name, or None."""
    parts = module.split(".")
    return next((int(p) for p in parts if p.isascii() and p.isdigit() and len(p) < 7), None)


def kinds_of(rows: Sequence[JsonObject], most: int = 12) -> dict[str, list[JsonObject]]:
    """Rows by kind: attention first, then as they come; the rarest are `other` beyond `most`."""
    found: dict[str, list[JsonObject]] = {}
    for row in rows:
        found.setdefault(kind_of(row["module"]), []).append(row)
    if len(found) > most:
        common = sorted(found, key=lambda kind: -len(found[kind]))[: most - 1]
        rest = [row for kind in found if kind not in common for row in found[kind]]
        found = {kind: found[kind] for kind in found if kind in common} | {"other": rest}
    ordered = [kind for kind in _ORDER if kind in found]
    return {kind: found[kind] for kind in (*ordered, *found)}
