"""Parts of a page: what a run was, its tables, its lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from operator import itemgetter
from typing import Any

from ptq_cli.core.text import common_parents
from ptq_cli.report.html.subject import Subject, worst_first
from ptq_cli.report.html.text import (
    Cell,
    Column,
    details,
    escaped,
    figure_number,
    kind_of,
    section,
    table,
    with_digits,
)
from ptq_cli.report.report import row_error, row_rtn_error
from ptq_cli.report.words import of_site, predicted, smoothed, times

MOST_ROWS = 2000  # layers in the page's table: a browser sorts so many at once
_MOST_LISTED = 500

Document = Mapping[str, Any]


def quality_table(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return ""
    titles = ("Perplexity", "Increase", "KL, mean", "KL, 99.9 %", "Equal top token")
    columns = [Column("Model", itemgetter(0), "name")]
    columns += [Column(title, itemgetter(i)) for i, title in enumerate(titles, 1)]
    rows: list[list[Cell | str]] = [
        ["original", f"{quality['perplexity']['original']:.4f}", "", "", "", ""]
    ]
    for name, label in (("quantized", "quantized"), ("rtn", "rounded to nearest")):
        perplexity, rise, same = predicted(quality, name)
        kl = (figure_number(quality["kl"][name][key]) for key in ("mean", "p99_9"))
        rows.append([label, perplexity, rise, *kl, same])
    about = (
        f'<p class="hint">{quality["tokens"]} tokens predicted in {quality["sequences"]} sequences.'
        " Standard errors are clustered by sequence; KL divergence of the next-token distributions"
        " from the original's, in nats.</p>"
    )
    return table(columns, rows, "Predictions") + about


def layers_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>No layer was quantized.</p>"
    common = common_parents([row["module"] for row in rows])
    columns = [
        Column("Layer", lambda row: row["module"].removeprefix(common), "name"),
        Column("Error", lambda row: figure_number(row_error(row))),
        Column("RTN error", lambda row: figure_number(row_rtn_error(row))),
        Column("Gain", lambda row: Cell(times(row["gain_vs_rtn"]), row["gain_vs_rtn"])),
    ]
    if any(row.get("activations") for row in rows):
        columns += [
            Column("Integer error", lambda row: _integer_error(row, "integer")),
            Column("Plain integer", lambda row: _integer_error(row, "plain")),
        ]
    columns += [
        Column("Kind", lambda row: kind_of(row["module"]), "text"),
        Column("Method", itemgetter("method"), "text"),
        Column("Bits/w", lambda row: with_digits(row["bits_per_weight"], 2)),
        Column("SQNR, dB", lambda row: with_digits(row["sqnr_db"], 1)),
        Column("Max |error|", lambda row: figure_number(row["max_abs_err"])),
        Column("Shape", lambda row: Cell(_shape(row["shape"]), prod(map(float, row["shape"])))),
        Column("Notes", _notes, "long"),
    ]
    return sortable_table(columns, worst_first(rows), common)


def sortable_table(columns: Sequence[Column], rows: Sequence[Any], common: str) -> str:
    """The table of layers, which the script sorts and filters.

    rows: the worst first, of which MOST_ROWS are shown; their names are shown without `common`
    """
    words = []
    if common:
        words.append(f"All names begin with {common}")
    if len(rows) > MOST_ROWS:
        words.append(f"these are the worst {MOST_ROWS} of {len(rows)}, report.json has all")
    about = f'<p class="hint">{escaped("; ".join(words))}</p>' if words else ""
    shown = rows[:MOST_ROWS]
    return _filter_controls(columns, shown) + about + table(columns, shown, "Layers", sortable=True)


def _integer_error(row: Mapping[str, Any], part: str) -> Cell:
    return figure_number((row.get("activations") or {}).get(part, {}).get("rel_err"))


def _notes(row: Mapping[str, Any]) -> str:
    said = [f"fallback: {row['fallback']}"] if row["fallback"] else []
    return "; ".join([*said, *row["notes"]])


def _shape(shape: Sequence[int]) -> str:
    return "\u00d7".join(map(str, shape))


def _filter_controls(columns: Sequence[Column], rows: Sequence[Any]) -> str:
    """What filters the table; the script shows it."""
    selects = []
    for i, column in enumerate(columns):
        if column.kind != "text":
            continue
        values = dict.fromkeys(str(column.cell(row)) for row in rows)
        options = "".join(f'<option value="{escaped(v)}">{escaped(v)}</option>' for v in values)
        selects.append(
            f'<label>{escaped(column.title)} <select data-column="{i}">'
            f'<option value="">all</option>{options}</select></label>'
        )
    return (
        '<div class="controls" id="controls" hidden><label>Filter layers <input id="find"'
        ' type="search" autocomplete="off" spellcheck="false"></label>'
        f'{"".join(selects)}<output id="count" aria-live="polite"></output></div>'
    )


def sites_table(sites: Sequence[Mapping[str, Any]]) -> str:
    if not sites:
        return ""
    columns = [
        Column("Site", itemgetter("site"), "name"),
        Column("Strength", lambda site: figure_number(site["strength"])),
        Column("Error", lambda site: figure_number(site["error"])),
        Column("Without", lambda site: figure_number(site["plain_error"])),
        Column("Float change", lambda site: figure_number(site["function_change"])),
        Column("Folded into", lambda site: site["fed_by"] or "-", "text"),
        Column("Notes", of_site, "long"),
    ]
    return details(smoothed(sites), table(columns, sites[:MOST_ROWS], "Smoothed sites"))


def settings_table(subjects: Sequence[Subject]) -> str:
    """Settings, a column for each run; where they differ the row is marked."""
    keys: dict[str, None] = {}
    columns = [Column("Setting", str, "name")]
    for subject in subjects:
        settings = subject.document["settings"]
        keys |= dict.fromkeys(sorted(settings))
        title = subject.label if len(subjects) > 1 else "Value"
        columns.append(Column(title, lambda key, own=settings: _word(own.get(key)), "text"))
    differ = {
        i for i, key in enumerate(keys) if len({column.cell(key) for column in columns[1:]}) > 1
    }
    return details("Settings", table(columns, keys, "Settings", marked=differ))


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def left_alone_table(document: Document) -> str:
    entries = document["left_alone"]
    if not entries:
        return ""
    columns = [
        Column("Tensor", itemgetter("tensor"), "name"),
        Column("Type", itemgetter("dtype"), "text"),
        Column("Shape", lambda entry: _shape(entry["shape"]) or "-"),
        Column("Why", lambda entry: entry["reason"] or "-", "long"),
    ]
    shown = table(columns, entries[:_MOST_LISTED], "Tensors left alone")
    more = len(entries) - _MOST_LISTED
    shown += f'<p class="hint">and {more} more</p>' if more > 0 else ""
    return details(f"Tensors left alone: {len(entries)}", shown)


def warnings_list(warnings: Sequence[str]) -> str:
    lines = "".join(f"<li>{escaped(text)}</li>" for text in warnings[:_MOST_LISTED])
    return section("Warnings", f'<ul class="list">{lines}</ul>' if lines else "")


def described(document: Document) -> str:
    """The run in a line: method, grid, format, version."""
    settings = document["settings"]
    rows = document["layers"]
    words = [f"ptq {document['command']}"]
    if settings.get("method") and settings["method"] != document["command"]:
        words.append(f"method {settings['method']}")
    grids = sorted({(r["bits"], r["group_size"], r["sym"]) for r in rows})
    if len(grids) == 1:
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
    " any, else on calibration inputs; without calibration it is the error of the weights."
    "</p><p><b>RTN</b>: plain rounding to nearest at the same bits, groups and symmetry."
    " <b>Gain</b>: its error over this one; above 1 is better.</p><p><b>SQNR</b>: the error in"
    " decibels, higher is better. <b>Max |error|</b>: the largest change of a single weight.</p>",
)
