"""Pieces of HTML, and what a module's name says. Whatever comes from a report goes through
`escaped`."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ptq_cli.core.text import printable

_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
OTHER = "other"


def escaped(value: object) -> str:
    """Text for HTML, in an element or a quoted attribute, unprintable characters shown."""
    return escape(printable(str(value)), quote=True)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the number to sort by where the text is none."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    cell: what stands in it, of a row; kind: how it is set: "name" (first, sticky), "text", "long"
    """

    title: str
    cell: Callable[[Any], Cell | str]
    kind: str = "number"


def figure_number(value: float | None) -> Cell:
    """A measured number, sorted by all of its digits; three are shown, so that columns line up:
    0.0100 below 0.00993."""
    if value is None:
        return Cell("-")
    return Cell(f"{value:#.3g}".removesuffix(".") if value else "0", value)


def with_digits(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(
    columns: Sequence[Column],
    rows: Iterable[Any],
    caption: str,
    *,
    sortable: bool = False,
    marked: Container[int] = (),
) -> str:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its head.

    sortable: the script finds it and sorts it; marked: numbers of rows to be made out
    """
    button, end = ('<button type="button">', "</button>") if sortable else ("", "")
    heads = "".join(
        f'<th scope="col" class="{column.kind}">{button}{escaped(column.title)}{end}</th>'
        for column in columns
    )
    body = "\n".join(_row(columns, row, i in marked) for i, row in enumerate(rows))
    own = ' id="layers"' if sortable else ""
    css = "scroll rows" if sortable else "scroll"
    return (
        f'<div class="{css}" role="region" tabindex="0" aria-label="{escaped(caption)}">'
        f'<table{own} aria-label="{escaped(caption)}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(columns: Sequence[Column], row: Any, marked: bool) -> str:
    cells = []
    for i, column in enumerate(columns):
        entry = column.cell(row)
        cell = Cell(entry) if isinstance(entry, str) else entry
        tag = 'th scope="row"' if i == 0 else "td"
        css = f' class="{column.kind}"' if column.kind != "number" else ""
        own = f' data-v="{cell.value:.6g}"' if cell.value is not None else ""
        cells.append(f"<{tag}{css}{own}>{escaped(cell.text)}</{tag[:2]}>")
    css = ' class="marked"' if marked else ""
    return f"<tr{css}>{''.join(cells)}</tr>"


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
    return next(
        (int(p) for p in module.split(".") if p.isascii() and p.isdigit() and len(p) < 7), None
    )


def kinds_of(
    rows: Sequence[Mapping[str, Any]], most: int = 12
) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by kind: attention first, then as they come; the rarest are `other` beyond `most`."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(kind_of(row["module"]), []).append(row)
    if len(found) > most:
        common = sorted(found, key=lambda kind: -len(found[kind]))[: most - 1]
        rest = [row for kind in found if kind not in common for row in found[kind]]
        found = {kind: found[kind] for kind in found if kind in common} | {OTHER: rest}
    known = {kind: place for place, kind in enumerate(_ORDER)}
    return {k: found[k] for k in sorted(found, key=lambda kind: known.get(kind, len(known)))}
