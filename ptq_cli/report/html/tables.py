"""Tables of a page, and other parts: what a run was, its lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from typing import Any

from ptq_cli.core.text import common_parents
from ptq_cli.report.html.subject import Subject, worst_first
from ptq_cli.report.html.text import details, escaped, kind_of, section
from ptq_cli.report.report import JsonObject, row_error, row_rtn_error, value_at
from ptq_cli.report.words import cached, of_site, predicted, smoothed, times

_MOST_ROWS = 2000  # layers in the page's table: a browser sorts so many at once
_MOST_LISTED = 500


def figure(value: float) -> str:
    """A measured number; three digits are shown, so that columns line up: 0.0100 below 0.00993."""
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def shape(sizes: Sequence[int]) -> str:
    return "\u00d7".join(map(str, sizes)) or "-"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    value: what stands in it, of a row; None is a dash
    kind: how it is set: "name" (first, sticky), "number", "text", "long"
    form: makes a text of a value that is none; numbers are sorted by all their digits
    """

    title: str
    value: Callable[[Any], Any]
    kind: str = "number"
    form: Callable[[Any], str] = figure


def table(
    columns: Sequence[Column],
    rows: Iterable[Any],
    caption: str,
    *,
    sortable: bool = False,
    marked: Container[Any] = (),
) -> str:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its head.

    sortable: the script finds it and sorts it; marked: rows to be made out
    """
    button, end = ('<button type="button">', "</button>") if sortable else ("", "")
    heads = "".join(
        f'<th scope="col" class="{column.kind}">{button}{escaped(column.title)}{end}</th>'
        for column in columns
    )
    body = []
    for row in rows:
        css = ' class="marked"' if row in marked else ""
        first, *others = (_cell(column, column.value(row)) for column in columns)
        cells = "".join(f"<td{cell}</td>" for cell in others)
        body.append(f'<tr{css}><th scope="row"{first}</th>{cells}</tr>')
    own = ' id="layers"' if sortable else ""
    css = "scroll rows" if sortable else "scroll"
    lines = "\n".join(body)
    return (
        f'<div class="{css}" role="region" tabindex="0" aria-label="{escaped(caption)}">'
        f'<table{own} aria-label="{escaped(caption)}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _cell(column: Column, value: Any) -> str:
    """A cell without its tag's name: its attributes and its text."""
    text = "-" if value is None else value if isinstance(value, str) else column.form(value)
    if column.kind != "number":
        return f' class="{column.kind}">{escaped(text)}'
    exact = prod(map(float, value)) if isinstance(value, list) else value
    own = f' data-v="{exact:.6g}"' if isinstance(exact, int | float) else ""
    return f"{own}>{escaped(text)}"


def quality_table(quality: JsonObject | None) -> str:
    if quality is None:
        return ""
    titles = ("Perplexity", "Increase", "KL, mean", "KL, 99.9 %", "Equal top token")
    columns = [Column("Model", itemgetter(0), "name")]
    columns += [Column(title, itemgetter(i)) for i, title in enumerate(titles, 1)]
    rows = [["original", f"{quality['perplexity']['original']:.4f}", "", "", "", ""]]
    for name, label in (("quantized", "quantized"), ("rtn", "rounded to nearest")):
        perplexity, rise, same = predicted(quality, name)
        kl = quality["kl"][name]
        rows.append([label, perplexity, rise, kl["mean"], kl["p99_9"], same])
    about = (
        f'<p class="hint">{quality["tokens"]} tokens predicted in {quality["sequences"]} sequences.'
        " Standard errors are clustered by sequence; KL divergence of the next-token distributions"
        " from the original's, in nats.</p>"
    )
    return table(columns, rows, "Predictions") + about


def layers_table(rows: Sequence[JsonObject]) -> str:
    if not rows:
        return "<p>No layer was quantized.</p>"
    common = common_parents([row["module"] for row in rows])
    columns = [
        Column("Layer", lambda row: row["module"].removeprefix(common), "name"),
        Column("Error", row_error),
        Column("RTN error", row_rtn_error),
        Column("Gain", itemgetter("gain_vs_rtn"), form=times),
    ]
    if any(row.get("weight_rel_err") is not None for row in rows):
        columns.append(Column("Weight only", value_at("weight_rel_err")))
    if any(row.get("activations") for row in rows):
        for title, part in (("Integer error", "integer"), ("Plain integer", "plain")):
            columns.append(Column(title, value_at("activations", part, "rel_err")))
    columns += [
        Column("Kind", lambda row: kind_of(row["module"]), "text"),
        Column("Method", itemgetter("method"), "text"),
        *_types(rows),
        Column("Bits/w", itemgetter("bits_per_weight"), form="{:.2f}".format),
        Column("SQNR, dB", itemgetter("sqnr_db"), form="{:.1f}".format),
        Column("Max |error|", itemgetter("max_abs_err")),
        Column("Shape", itemgetter("shape"), form=shape),
        Column("Notes", _notes, "long"),
    ]
    return sortable_table(columns, worst_first(rows), common)


def _types(rows: Sequence[JsonObject]) -> list[Column]:
    """What a format calls the numbers of layers, where it has names for them."""
    named = any(row.get("type") for row in rows)
    return [Column("Type", lambda row: row.get("type") or "-", "text")] if named else []


def sortable_table(columns: Sequence[Column], rows: Sequence[Any], common: str) -> str:
    """The table of layers, which the script sorts and filters.

    rows: the worst first, shown up to a number; common: what their names are shown without
    """
    words = []
    if common:
        words.append(f"All names begin with {common}")
    if len(rows) > _MOST_ROWS:
        words.append(f"these are the worst {_MOST_ROWS} of {len(rows)}, report.json has all")
    about = f'<p class="hint">{escaped("; ".join(words))}</p>' if words else ""
    shown = rows[:_MOST_ROWS]
    return _filter_controls(columns, shown) + about + table(columns, shown, "Layers", sortable=True)


def _notes(row: JsonObject) -> str:
    said = [f"fallback: {row['fallback']}"] if row["fallback"] else []
    return "; ".join([*said, *row["notes"]])


def _filter_controls(columns: Sequence[Column], rows: Sequence[Any]) -> str:
    """What filters the table; the script shows it."""
    selects = []
    for i, column in enumerate(columns):
        if column.kind != "text":
            continue
        values = dict.fromkeys(escaped(column.value(row)) for row in rows)
        options = "".join(f'<option value="{value}">{value}</option>' for value in values)
        selects.append(
            f'<label>{escaped(column.title)} <select data-column="{i}">'
            f'<option value="">all</option>{options}</select></label>'
        )
    return (
        '<div class="controls" id="controls" hidden><label>Filter layers <input id="find"'
        ' type="search" autocomplete="off" spellcheck="false"></label>'
        f'{"".join(selects)}<output id="count" aria-live="polite"></output></div>'
    )


def sites_table(sites: Sequence[JsonObject]) -> str:
    if not sites:
        return ""
    columns = [
        Column("Site", itemgetter("site"), "name"),
        Column("Strength", itemgetter("strength")),
        Column("Error", itemgetter("error")),
        Column("Without", itemgetter("plain_error")),
        Column("Float change", itemgetter("function_change")),
        Column("Folded into", itemgetter("fed_by"), "text"),
        Column("Notes", of_site, "long"),
    ]
    return details(smoothed(sites), table(columns, sites[:_MOST_ROWS], "Smoothed sites"))


def cache_table(blocks: Sequence[JsonObject]) -> str:
    """How much of FP8's range the keys and values of each block use."""
    if not blocks:
        return ""
    columns = [Column("Attention", itemgetter("module"), "name")]
    for what, title in (("keys", "Keys"), ("values", "Values")):
        columns += [
            Column(f"{title}, largest", value_at(what, "absmax")),
            Column("used", value_at(what, "used"), form="{:.0%}".format),
            Column("held-out", value_at(what, "heldout_used"), form="{:.0%}".format),
        ]
    about = (
        '<p class="hint">Used: how much of the range of its scale (\u00b1448) the head reaches'
        " that reaches least of it; held-out: the most that a head reaches on tokens that the"
        " scales were not taken from, above 100 % it is clipped.</p>"
    )
    return details(cached(blocks), table(columns, blocks[:_MOST_ROWS], "Key-value cache") + about)


def settings_table(subjects: Sequence[Subject]) -> str:
    """Settings, a column for each run; where they differ the row is marked."""
    runs = [subject.document["settings"] for subject in subjects]
    keys = list(dict.fromkeys(key for settings in runs for key in sorted(settings)))
    titles = [subject.label for subject in subjects] if len(subjects) > 1 else ["Value"]
    columns = [Column("Setting", str, "name")]
    for title, settings in zip(titles, runs, strict=True):
        columns.append(Column(title, settings.get, "text", _word))
    differ = [key for key in keys if any(own.get(key) != runs[0].get(key) for own in runs)]
    return details("Settings", table(columns, keys, "Settings", marked=differ))


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        short = {key: own for key, own in value.items() if isinstance(own, int | float | str)}
        return ", ".join(f"{key} {own}" for key, own in short.items()) or "-"
    return (", ".join(map(str, value)) or "-") if isinstance(value, list) else str(value)


def left_alone_table(document: JsonObject) -> str:
    entries = document["left_alone"]
    if not entries:
        return ""
    columns = [
        Column("Tensor", itemgetter("tensor"), "name"),
        Column("Type", itemgetter("dtype"), "text"),
        Column("Shape", itemgetter("shape"), form=shape),
        Column("Why", lambda entry: entry["reason"] or "-", "long"),
    ]
    shown = table(columns, entries[:_MOST_LISTED], "Tensors left alone")
    more = len(entries) - _MOST_LISTED
    shown += f'<p class="hint">and {more} more</p>' if more > 0 else ""
    return details(f"Tensors left alone: {len(entries)}", shown)


def warnings_list(warnings: Sequence[str]) -> str:
    lines = "".join(f"<li>{escaped(text)}</li>" for text in warnings[:_MOST_LISTED])
    return section("Warnings", f'<ul class="list">{lines}</ul>' if lines else "")


def described(document: JsonObject) -> str:
    """The run in a line: method, grid, format, version."""
    settings = document["settings"]
    rows = document["layers"]
    words = [f"ptq {document['command']}"]
    if settings.get("method") and settings["method"] != document["command"]:
        words.append(f"method {settings['method']}")
    grids = sorted({(r["bits"], r["group_size"], r["sym"]) for r in rows})
    types = Counter(row.get("type") or "" for row in rows).most_common()
    if types and all(kind for kind, _ in types):
        words += [f"{count} {kind}" for kind, count in types]
    elif len(grids) == 1:
        bits, group, sym = grids[0]
        groups = {-1: "a scale per row", 0: "a scale per tensor"}.get(group, f"groups of {group}")
        words += [f"{bits} bits", groups, "symmetric" if sym else "asymmetric"]
    elif grids:
        words.append(f"{len(grids)} different grids")
    return ", ".join([*words, f"format {settings['format']}", f"version {document['ptq']}"])


READING = details(
    "How to read this page",
    "<p><b>Error</b>: what the outputs of a layer lose, squared, relative to the outputs"
    " themselves (0.01 is 1 %); on held-out inputs, which calibration has not seen, where there are"
    " any, else on calibration inputs; without calibration it is the error of the weights. Where"
    " inputs are rounded too (W8A8), errors and RTN are those of outputs with rounded inputs;"
    " <b>Weight only</b> is with float inputs."
    "</p><p><b>RTN</b>: plain rounding to nearest at the same bits, groups and symmetry."
    " <b>Gain</b>: its error over this one; above 1 is better.</p><p><b>SQNR</b>: the error in"
    " decibels, higher is better. <b>Max |error|</b>: the largest change of a single weight.</p>",
)
