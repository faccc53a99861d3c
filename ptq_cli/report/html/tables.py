"""Parts of a page: what a run was, its tables, its lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
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
)
from ptq_cli.report.report import row_error, row_rtn_error
from ptq_cli.report.words import of_site, predicted, smoothed, times

MOST_ROWS = 2000  # layers in the page's table: a browser sorts so many at once
_MOST_LISTED = 500

Document = Mapping[str, Any]


def quality_table(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return ""
    columns = [Column("Model", "name"), Column("Perplexity"), Column("Increase")]
    columns += [Column("KL, mean"), Column("KL, 99.9 %"), Column("Equal top token")]
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
    ordered = worst_first(rows)[:MOST_ROWS]
    integer = any(row.get("activations") for row in rows)
    columns = [Column("Layer", "name"), Column("Error"), Column("RTN error"), Column("Gain")]
    columns += [Column("Integer error"), Column("Plain integer")] if integer else []
    columns += [Column("Kind", "text"), Column("Method", "text"), Column("Bits/w")]
    columns += [Column("SQNR, dB"), Column("Max |error|"), Column("Shape"), Column("Notes", "long")]
    body = [_layer(row, common, integer) for row in ordered]
    return sortable_table(columns, body, len(rows), common)


def sortable_table(
    columns: Sequence[Column], body: Sequence[Sequence[Cell | str]], count: int, common: str
) -> str:
    """The table of layers, which the script sorts and filters.

    body: the worst MOST_ROWS of `count`, their names without `common`
    """
    words = []
    if common:
        words.append(f"All names begin with {common}")
    if count > MOST_ROWS:
        words.append(f"these are the worst {MOST_ROWS} of {count}, report.json has all")
    about = f'<p class="hint">{escaped("; ".join(words))}</p>' if words else ""
    return _filter_controls(columns, body) + about + table(columns, body, "Layers", sortable=True)


def _layer(row: Mapping[str, Any], common: str, integer: bool) -> list[Cell | str]:
    gain, shape = row["gain_vs_rtn"], row["shape"]
    cells: list[Cell | str] = [
        row["module"].removeprefix(common),
        figure_number(row_error(row)),
        figure_number(row_rtn_error(row)),
        Cell(times(gain), gain),
    ]
    if integer:
        errors = row.get("activations") or {}
        for part in ("integer", "plain"):
            cells.append(figure_number(errors.get(part, {}).get("rel_err")))
    said = [f"fallback: {row['fallback']}"] if row["fallback"] else []
    return [
        *cells,
        kind_of(row["module"]),
        row["method"],
        f"{row['bits_per_weight']:.2f}",
        "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
        figure_number(row["max_abs_err"]),
        Cell(_shape(shape), prod(map(float, shape))),
        "; ".join([*said, *row["notes"]]),
    ]


def _shape(shape: Sequence[int]) -> str:
    return "\u00d7".join(map(str, shape))


def _filter_controls(columns: Sequence[Column], body: Sequence[Sequence[Cell | str]]) -> str:
    """What filters the table; the script shows it."""
    selects = []
    for i, column in enumerate(columns):
        if column.kind != "text":
            continue
        values = list(dict.fromkeys(str(row[i]) for row in body))
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
    columns = [Column("Site", "name"), Column("Strength"), Column("Error"), Column("Without")]
    columns += [Column("Float change"), Column("Folded into", "text"), Column("Notes", "long")]
    numbers = ("strength", "error", "plain_error", "function_change")
    rows: list[list[Cell | str]] = [
        [
            site["site"],
            *(figure_number(site[key]) for key in numbers),
            site["fed_by"] or "-",
            of_site(site),
        ]
        for site in sites[:MOST_ROWS]
    ]
    return details(smoothed(sites), table(columns, rows, "Smoothed sites"))


def settings_table(subjects: Sequence[Subject]) -> str:
    """Settings, a column for each run; where they differ the row is marked."""
    every: dict[str, None] = {}
    for subject in subjects:
        every |= dict.fromkeys(sorted(subject.document["settings"]))
    rows = [
        [key, *(_word(subject.document["settings"].get(key)) for subject in subjects)]
        for key in every
    ]
    columns = [Column("Setting", "name")]
    columns += [Column(s.label if len(subjects) > 1 else "Value", "text") for s in subjects]
    differ = {i for i, row in enumerate(rows) if len(set(row[1:])) > 1}
    return details("Settings", table(columns, rows, "Settings", marked=differ))


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
    columns = [Column("Tensor", "name"), Column("Type", "text"), Column("Shape")]
    rows = [
        [entry["tensor"], entry["dtype"], _shape(entry["shape"]) or "-", entry["reason"] or "-"]
        for entry in entries[:_MOST_LISTED]
    ]
    shown = table([*columns, Column("Why", "long")], rows, "Tensors left alone")
    more = len(entries) - len(rows)
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
