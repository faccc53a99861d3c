"""The page: one HTML file that needs nothing else.

No network: fonts are the system's, charts are inline SVG, and a content security policy forbids the
rest, scripts but the page's own included, should a name in a report ever get past the escaping. The
same report gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ptq_cli.core.text import common_parents, number, size
from ptq_cli.report.html import tables
from ptq_cli.report.html.charts import charts_between, charts_of
from ptq_cli.report.html.style import SCRIPT, STYLE
from ptq_cli.report.html.subject import Subject
from ptq_cli.report.html.text import Cell, Column, escaped, figure_number, kind_of, section, table
from ptq_cli.report.report import row_error
from ptq_cli.report.words import measured_on, times


def page(subjects: Sequence[Subject]) -> str:
    """The page of one run, or of several side by side. Raises nothing that a report can cause."""
    parts = _one_run(subjects[0]) if len(subjects) == 1 else _several_runs(subjects)
    return _document(", ".join(s.label for s in subjects), "\n".join(filter(None, parts)))


def _document(title: str, body: str) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
        f" script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="generator" content="ptq">\n'
        f'<link rel="icon" href="data:,">\n<title>{escaped(title)} - ptq report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _charts(figures: Sequence[str]) -> str:
    joined = "\n".join(filter(None, figures))
    return section("Charts", f'<div class="charts">{joined}</div>' if joined else "")


def _measured_on(totals: Mapping[str, Any]) -> str:
    where = measured_on(totals)
    return f"of {where}" if where == "the weights" else f"of outputs, on {where}"


# ---- one run ----


def _one_run(subject: Subject) -> Sequence[str]:
    document = subject.document
    return (
        f"<header><h1>{escaped(subject.label)}</h1>"
        f'<p class="under">{escaped(tables.described(document))}</p></header>',
        _tiles(subject),
        _gates(subject),
        tables.warnings_list(document["warnings"]),
        _charts(charts_of(subject)),
        section("Predictions", tables.quality_table(document.get("quality"))),
        section("Layers", tables.layers_table(document["layers"])),
        section("Smoothed sites", tables.sites_table(document.get("sites", ()))),
        section(
            "Details",
            tables.settings_table([subject]) + tables.left_alone_table(document) + tables.READING,
        ),
    )


class _Tile(NamedTuple):
    """A figure of the headline; css: "good", "bad" or neither."""

    title: str
    value: str
    about: str
    css: str = ""


def _tiles(subject: Subject) -> str:
    tiles = "".join(
        f'<div class="tile"><dt>{escaped(tile.title)}</dt><dd><strong class="{tile.css}">'
        f"{escaped(tile.value)}</strong><small>{escaped(tile.about)}</small></dd></div>"
        for tile in (
            *_sizes(subject.document),
            *_errors(subject.document["totals"]),
            *_predictions(subject.document),
            *_verdicts(subject),
        )
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _sizes(document: tables.Document) -> list[_Tile]:
    totals = document["totals"]
    bits, ratio = totals.get("bits_per_weight"), totals.get("compression_ratio")
    about = [f"{ratio:.2f}x smaller"] if ratio else []
    about += [f"{bits:.2f} bits per weight"] if bits else []
    sizes = f"{size(totals['bytes_before'])} \u2192 {size(totals['bytes_after'])}"
    return [_Tile("Size", sizes, ", ".join(about))]


def _errors(totals: Mapping[str, Any]) -> list[_Tile]:
    tiles = []
    if totals.get("mean_rel_err") is not None:
        worst, where = totals.get("worst_rel_err"), totals.get("worst_layer") or ""
        tiles.append(_Tile("Mean error", number(totals["mean_rel_err"]), _measured_on(totals)))
        tiles.append(_Tile("Worst error", number(worst), where))
    gain = totals.get("gain_vs_rtn")
    if gain is not None:
        about = f"round-to-nearest has a mean error of {number(totals.get('rtn_mean_rel_err'))}"
        css = "good" if gain > 1.005 else "bad" if gain < 0.995 else ""
        tiles.append(_Tile("Gain over round-to-nearest", times(gain), about, css))
    return tiles


def _predictions(document: tables.Document) -> list[_Tile]:
    quality = document.get("quality")
    if quality is None:
        return []
    values = quality["perplexity"]
    rise, plain = (quality["increase"][name]["perplexity"] for name in ("quantized", "rtn"))
    both = f"{values['original']:.4g} \u2192 {values['quantized']:.4g}"
    return [_Tile("Perplexity", both, f"{rise:+.3g}; round-to-nearest {plain:+.3g}")]


def _verdicts(subject: Subject) -> list[_Tile]:
    """Fallbacks and gates."""
    fallbacks = subject.document["totals"].get("fallbacks")
    tiles = []
    if fallbacks:
        about = "layers were rounded to nearest"
        tiles.append(_Tile("Fallbacks", str(fallbacks), about, "bad"))
    if subject.gates:
        missed = sum(not gate.passed for gate in subject.gates)
        words, css = (f"{missed} missed", "bad") if missed else ("all passed", "good")
        tiles.append(_Tile("Gates", words, f"{len(subject.gates)} gates were set", css))
    return tiles


def _gates(subject: Subject) -> str:
    if not subject.gates:
        return ""
    lines = []
    for gate in subject.gates:
        word, css = ("passed", "good") if gate.passed else ("missed", "bad")
        value = "nothing to measure" if gate.value is None else f"measured {gate.value:.4g}"
        said = value if gate.passed else gate.said
        lines.append(
            f'<li class="{word}"><span class="{css}">{word}</span>'
            f" <code>{escaped(gate.name)}</code>: {escaped(said)}</li>"
        )
    return section("Quality gates", f'<ul class="list">{"".join(lines)}</ul>')


# ---- several runs ----


def _several_runs(subjects: Sequence[Subject]) -> Sequence[str]:
    return (
        f"<header><h1>{len(subjects)} runs compared</h1>{_fairness(subjects)}</header>",
        section("Runs", _runs(subjects)),
        _charts(charts_between(subjects)),
        section("Layers", _layers_between(subjects)),
        tables.warnings_list(
            [f"{s.label}: {text}" for s in subjects for text in s.document["warnings"]]
        ),
        section("Details", tables.settings_table(subjects) + tables.READING),
    )


def _fairness(subjects: Sequence[Subject]) -> str:
    """Whether the runs may be compared at all."""
    places = {_measured_on(s.document["totals"]) for s in subjects if s.document["layers"]}
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
            times(gain),
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
        rows.append([*row, tables.described(subject.document)])
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
        errors = [None if row is None else row_error(row) for row in own]
        known = [error for error in errors if error is not None]
        best = subjects[errors.index(min(known))].label
        cells = [module.removeprefix(common), *map(figure_number, errors), kind_of(module), best]
        body.append((max(known), cells))
    body.sort(key=lambda entry: -entry[0])
    columns = [Column("Layer", "name"), *(Column(subject.label) for subject in subjects)]
    columns += [Column("Kind", "text"), Column("Best", "text")]
    rows = [cells for _, cells in body[: tables.MOST_ROWS]]
    return tables.sortable_table(columns, rows, len(body), common)
