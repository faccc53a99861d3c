"""The page: one HTML file that needs nothing else.

No network: fonts are the system's, charts are inline SVG, and a content security policy forbids the
rest, scripts but the page's own included, should a name in a report ever get past the escaping. The
same report gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from operator import itemgetter

from ptq_cli.core.text import common_parents, number, size
from ptq_cli.plan.prediction import prediction_of
from ptq_cli.report.html import tables
from ptq_cli.report.html.allocation import mix_table
from ptq_cli.report.html.charts import charts_between, charts_of
from ptq_cli.report.html.style import SCRIPT, STYLE
from ptq_cli.report.html.subject import Subject
from ptq_cli.report.html.tables import Column
from ptq_cli.report.html.text import escaped, kind_of, section
from ptq_cli.report.report import JsonObject, row_error, value_at
from ptq_cli.report.words import kl_measured, measured_on, times


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


def _measured_on(totals: JsonObject) -> str:
    where = measured_on(totals)
    return f"of {where}" if where.startswith("the weights") else f"of outputs, on {where}"


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
        section("Mix of widths", mix_table(document["layers"])),
        section("Layers", tables.layers_table(document["layers"])),
        section("Smoothed sites", tables.sites_table(document.get("sites", ()))),
        section("Key-value cache", tables.cache_table(document.get("kv_cache", ()))),
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
        _allocation(subject.document),
        *_verdicts(subject),
    ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _sizes(totals: JsonObject) -> str:
    bits, ratio = totals.get("bits_per_weight"), totals.get("compression_ratio")
    about = [f"{ratio:.2f}x smaller"] if ratio else []
    about += [f"{bits:.2f} bits per weight"] if bits else []
    sizes = f"{size(totals['bytes_before'])} \u2192 {size(totals['bytes_after'])}"
    return _tile("Size", sizes, ", ".join(about))


def _errors(totals: JsonObject) -> Iterator[str]:
    if totals.get("mean_rel_err") is not None:
        worst, where = totals.get("worst_rel_err"), totals.get("worst_layer") or ""
        yield _tile("Mean error", number(totals["mean_rel_err"]), _measured_on(totals))
        yield _tile("Worst error", number(worst), where)
    gain = totals.get("gain_vs_rtn")
    if gain is not None:
        about = f"round-to-nearest has a mean error of {number(totals.get('rtn_mean_rel_err'))}"
        css = "good" if gain > 1.005 else "bad" if gain < 0.995 else ""
        yield _tile("Gain over round-to-nearest", times(gain), about, css)


def _predictions(quality: JsonObject | None) -> str:
    if quality is None:
        return ""
    values = quality["perplexity"]
    rise, plain = (quality["increase"][name]["perplexity"] for name in ("quantized", "rtn"))
    both = f"{values['original']:.4g} \u2192 {values['quantized']:.4g}"
    return _tile("Perplexity", both, f"{rise:+.3g}; round-to-nearest {plain:+.3g}")


def _allocation(document: JsonObject) -> str:
    """What was predicted of the mix of widths."""
    prediction = prediction_of(document["settings"])
    if prediction is None:
        return ""
    measured = kl_measured(document.get("quality")) if prediction.is_kl else None
    about = f"at {prediction.bits_per_weight:.2f} bits per weight"
    about += "" if measured is None else f"; measured {measured}"
    return _tile(f"Predicted {prediction.word}", number(prediction.value), about)


def _verdicts(subject: Subject) -> Iterator[str]:
    """Fallbacks and gates."""
    fallbacks = subject.document["totals"].get("fallbacks")
    if fallbacks:
        yield _tile("Fallbacks", str(fallbacks), "layers were rounded to nearest", "bad")
    if subject.gates:
        missed = sum(not gate.passed for gate in subject.gates)
        words, css = (f"{missed} missed", "bad") if missed else ("all passed", "good")
        yield _tile("Gates", words, f"{len(subject.gates)} gates were set", css)


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
        Column("Run", itemgetter("label"), "name"),
        Column("Bits/w", value_at("totals", "bits_per_weight"), form="{:.2f}".format),
        Column("Mean error", value_at("totals", "mean_rel_err")),
        Column("Worst error", value_at("totals", "worst_rel_err")),
        Column("Gain", value_at("totals", "gain_vs_rtn"), form=times),
        Column("Size", value_at("totals", "bytes_after"), form=size),
    ]
    if any(subject.document.get("quality") for subject in subjects):
        perplexity = value_at("quality", "perplexity", "quantized")
        rise = value_at("quality", "increase", "quantized", "perplexity")
        columns.append(Column("Perplexity", perplexity, form="{:.4f}".format))
        columns.append(Column("Increase", rise, form="{:+.3g}".format))
    columns.append(Column("What", tables.described, "text"))
    rows = [{**subject.document, "label": subject.label} for subject in subjects]
    return tables.table(columns, rows, "Runs")


def _layers_between(subjects: Sequence[Subject]) -> str:
    """A row for each layer of any run, a column of errors for each run."""
    labels = [subject.label for subject in subjects]
    errors = [{row["module"]: row_error(row) for row in s.document["layers"]} for s in subjects]
    modules = list(dict.fromkeys(module for own in errors for module in own))
    if not modules:
        return ""

    def best(module: str) -> str:
        known = [i for i, own in enumerate(errors) if module in own]
        return labels[min(known, key=lambda i: errors[i][module])]

    common = common_parents(modules)
    columns = [
        Column("Layer", lambda module: module.removeprefix(common), "name"),
        *(Column(label, own.get) for label, own in zip(labels, errors, strict=True)),
        Column("Kind", kind_of, "text"),
        Column("Best", best, "text"),
    ]
    modules.sort(key=lambda module: -max(own[module] for own in errors if module in own))
    return tables.sortable_table(columns, modules, common)
