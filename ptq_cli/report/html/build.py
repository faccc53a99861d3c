"""The page: one HTML file that needs nothing else.

No network: fonts are the system's, charts are inline SVG, and a content security policy forbids the
rest, scripts but the page's own included, should a name in a report ever get past the escaping. The
same report gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ptq_cli.core.text import common_parents, number, size
from ptq_cli.report.html import tables
from ptq_cli.report.html.charts import charts_between, charts_of
from ptq_cli.report.html.style import SCRIPT, STYLE
from ptq_cli.report.html.subject import Subject
from ptq_cli.report.html.text import (
    Column,
    escaped,
    figure_number,
    kind_of,
    section,
    table,
    with_digits,
)
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


def _tile(title: str, value: str, about: str, css: str = "") -> str:
    """A figure of the headline; css: "good", "bad" or neither."""
    return (
        f'<div class="tile"><dt>{escaped(title)}</dt><dd><strong class="{css}">'
        f"{escaped(value)}</strong><small>{escaped(about)}</small></dd></div>"
    )


def _tiles(subject: Subject) -> str:
    tiles = [
        _sizes(subject.document["totals"]),
        *_errors(subject.document["totals"]),
        _predictions(subject.document.get("quality")),
        *_verdicts(subject),
    ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _sizes(totals: Mapping[str, Any]) -> str:
    bits, ratio = totals.get("bits_per_weight"), totals.get("compression_ratio")
    about = [f"{ratio:.2f}x smaller"] if ratio else []
    about += [f"{bits:.2f} bits per weight"] if bits else []
    sizes = f"{size(totals['bytes_before'])} \u2192 {size(totals['bytes_after'])}"
    return _tile("Size", sizes, ", ".join(about))


def _errors(totals: Mapping[str, Any]) -> list[str]:
    tiles = []
    if totals.get("mean_rel_err") is not None:
        worst, where = totals.get("worst_rel_err"), totals.get("worst_layer") or ""
        tiles.append(_tile("Mean error", number(totals["mean_rel_err"]), _measured_on(totals)))
        tiles.append(_tile("Worst error", number(worst), where))
    gain = totals.get("gain_vs_rtn")
    if gain is not None:
        about = f"round-to-nearest has a mean error of {number(totals.get('rtn_mean_rel_err'))}"
        css = "good" if gain > 1.005 else "bad" if gain < 0.995 else ""
        tiles.append(_tile("Gain over round-to-nearest", times(gain), about, css))
    return tiles


def _predictions(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return ""
    values = quality["perplexity"]
    rise, plain = (quality["increase"][name]["perplexity"] for name in ("quantized", "rtn"))
    both = f"{values['original']:.4g} \u2192 {values['quantized']:.4g}"
    return _tile("Perplexity", both, f"{rise:+.3g}; round-to-nearest {plain:+.3g}")


def _verdicts(subject: Subject) -> list[str]:
    """Fallbacks and gates."""
    fallbacks = subject.document["totals"].get("fallbacks")
    tiles = []
    if fallbacks:
        about = "layers were rounded to nearest"
        tiles.append(_tile("Fallbacks", str(fallbacks), about, "bad"))
    if subject.gates:
        missed = sum(not gate.passed for gate in subject.gates)
        words, css = (f"{missed} missed", "bad") if missed else ("all passed", "good")
        tiles.append(_tile("Gates", words, f"{len(subject.gates)} gates were set", css))
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
    columns = [
        Column("Run", lambda run: run.label, "name"),
        Column("Bits/w", lambda run: with_digits(_total(run, "bits_per_weight"), 2)),
        Column("Mean error", lambda run: figure_number(_total(run, "mean_rel_err"))),
        Column("Worst error", lambda run: figure_number(_total(run, "worst_rel_err"))),
        Column("Gain", lambda run: times(_total(run, "gain_vs_rtn"))),
        Column("Size", lambda run: size(_total(run, "bytes_after"))),
    ]
    if any(subject.document.get("quality") for subject in subjects):
        columns += [
            Column("Perplexity", lambda run: _predicted(run)[0]),
            Column("Increase", lambda run: _predicted(run)[1]),
        ]
    columns.append(Column("What", lambda run: tables.described(run.document), "text"))
    return table(columns, subjects, "Runs")


def _total(run: Subject, name: str) -> Any:
    return run.document["totals"].get(name)


def _predicted(run: Subject) -> tuple[str, str]:
    """Perplexity, and what that is above the original's."""
    quality = run.document.get("quality")
    if quality is None:
        return "-", "-"
    rise = quality["increase"]["quantized"]["perplexity"]
    return f"{quality['perplexity']['quantized']:.4f}", f"{rise:+.3g}"


def _layers_between(subjects: Sequence[Subject]) -> str:
    """A row for each layer of any run, a column of errors for each run."""
    errors: dict[str, dict[int, float]] = {}  # by module, by number of the run
    for i, subject in enumerate(subjects):
        for row in subject.document["layers"]:
            errors.setdefault(row["module"], {})[i] = row_error(row)
    if not errors:
        return ""

    def best(module: str) -> str:
        own = errors[module]
        return subjects[min(own, key=own.__getitem__)].label

    common = common_parents(list(errors))
    columns = [Column("Layer", lambda module: module.removeprefix(common), "name")]
    for i, subject in enumerate(subjects):
        label = subject.label
        columns.append(Column(label, lambda module, i=i: figure_number(errors[module].get(i))))
    columns += [Column("Kind", kind_of, "text"), Column("Best", best, "text")]
    worst_first = sorted(errors, key=lambda module: -max(errors[module].values()))
    return tables.sortable_table(columns, worst_first, common)
