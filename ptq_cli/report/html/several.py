"""The page of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from ptq_cli.core.text import common_parents, size
from ptq_cli.report.html.between import charts_between
from ptq_cli.report.html.names import kind_of
from ptq_cli.report.html.subject import Subject, error_of
from ptq_cli.report.html.tables import (
    MOST_ROWS,
    READING,
    about_table,
    described,
    figure,
    filter_controls,
    measured_on,
    settings_table,
    warnings_list,
)
from ptq_cli.report.html.text import Cell, Column, escaped, figure_number, section, table


def several_runs(subjects: Sequence[Subject]) -> str:
    charts = "\n".join(map(figure, charts_between(subjects)))
    warned = [f"{s.label}: {text}" for s in subjects for text in s.document["warnings"]]
    return "\n".join(
        part
        for part in (
            f"<header><h1>{len(subjects)} runs compared</h1>{_fairness(subjects)}</header>",
            section("Runs", _runs(subjects)),
            section("Charts", f'<div class="charts">{charts}</div>' if charts else ""),
            section("Layers", _layers_between(subjects)),
            warnings_list(warned),
            section("Details", settings_table(subjects) + READING),
        )
        if part
    )


def _fairness(subjects: Sequence[Subject]) -> str:
    """Whether the runs may be compared at all."""
    places = {measured_on(s.document["totals"]) for s in subjects if s.document["layers"]}
    names = [{row["module"] for row in s.document["layers"]} for s in subjects]
    doubts = [
        f"{s.label} was repacked: its errors are those against what it was repacked from."
        for s in subjects
        if s.document["settings"].get("method") == "repack"
    ]
    if len(places) > 1:
        doubts.append(f"Errors were not measured on the same: {'; '.join(sorted(places))}.")
    if any(name != names[0] for name in names):
        doubts.append("The runs do not have the same layers; means are over the layers of each.")
    if doubts:
        lines = "".join(f'<li class="missed">{escaped(text)}</li>' for text in doubts)
        return f'<ul class="list">{lines}</ul>'
    where = "".join(places) or "not measured"
    return f'<p class="under">{len(names[0])} layers, the same in each; errors {where}.</p>'


def _runs(subjects: Sequence[Subject]) -> str:
    measured = any(s.document.get("quality") for s in subjects)
    columns = [Column("Run", "name"), Column("Bits/w"), Column("Mean error")]
    columns += [Column("Worst error"), Column("Gain"), Column("Size")]
    columns += [Column("Perplexity"), Column("Increase")] if measured else []
    columns += [Column("What", "text")]
    rows = []
    for subject in subjects:
        totals, quality = subject.document["totals"], subject.document.get("quality")
        bits, gain = totals.get("bits_per_weight"), totals.get("gain_vs_rtn")
        row: list[Cell | str] = [
            subject.label,
            "-" if bits is None else f"{bits:.2f}",
            figure_number(totals.get("mean_rel_err")),
            figure_number(totals.get("worst_rel_err")),
            "-" if gain is None else f"{gain:.2f}x",
            size(totals["bytes_after"]),
        ]
        if measured:
            row += (
                ["-", "-"]
                if quality is None
                else [
                    f"{quality['perplexity']['quantized']:.4f}",
                    f"{quality['increase']['quantized']['perplexity']:+.3g}",
                ]
            )
        rows.append([*row, described(subject.document)])
    return table(columns, rows, "Runs")


def _layers_between(subjects: Sequence[Subject]) -> str:
    """A row for each layer of any run, a column of errors for each run."""
    by_module = [{row["module"]: row for row in s.document["layers"]} for s in subjects]
    modules = list(dict.fromkeys(module for rows in by_module for module in rows))
    if not modules:
        return ""
    common = common_parents(modules)
    body: list[tuple[float, list[Cell | str]]] = []
    for module in modules:
        own = [rows.get(module) for rows in by_module]
        errors = [None if row is None else error_of(row) for row in own]
        known = [error for error in errors if error is not None]
        best = subjects[errors.index(min(known))].label
        cells = [module.removeprefix(common), *map(figure_number, errors), kind_of(module), best]
        body.append((max(known), cells))
    body.sort(key=lambda entry: -entry[0])
    columns = [Column("Layer", "name"), *(Column(subject.label) for subject in subjects)]
    columns += [Column("Kind", "text"), Column("Best", "text")]
    rows = [cells for _, cells in body[:MOST_ROWS]]
    about = about_table(len(body), common)
    found = table(columns, rows, "Layers", ids="layers", sortable=True)
    return filter_controls(columns, rows) + about + found
