"""The page of one run: headline, gates, charts, tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ptq_cli.core.text import number, size
from ptq_cli.report.html.charts import charts_of
from ptq_cli.report.html.subject import Subject
from ptq_cli.report.html.tables import (
    READING,
    Document,
    described,
    figure,
    layers_table,
    left_alone_table,
    measured_on,
    quality_table,
    settings_table,
    sites_table,
    warnings_list,
)
from ptq_cli.report.html.text import escaped, section


class _Tile(NamedTuple):
    """A figure of the headline; css: "good", "bad" or neither."""

    title: str
    value: str
    about: str
    css: str = ""


def one_run(subject: Subject) -> str:
    document = subject.document
    rows = document["layers"]
    charts = "\n".join(map(figure, charts_of(subject)))
    return "\n".join(
        part
        for part in (
            f"<header><h1>{escaped(subject.label)}</h1>"
            f'<p class="under">{escaped(described(document))}</p></header>',
            _tiles(subject),
            _gates(subject),
            warnings_list(document["warnings"]),
            section("Charts", f'<div class="charts">{charts}</div>' if charts else ""),
            section("Predictions", quality_table(document.get("quality"))),
            section("Layers", layers_table(rows)),
            section("Smoothed sites", sites_table(document.get("sites", ()))),
            section("Details", settings_table([subject]) + left_alone_table(document) + READING),
        )
        if part
    )


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


def _sizes(document: Document) -> list[_Tile]:
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
        tiles.append(_Tile("Mean error", number(totals["mean_rel_err"]), measured_on(totals)))
        tiles.append(_Tile("Worst error", number(worst), where))
    gain = totals.get("gain_vs_rtn")
    if gain is not None:
        about = f"round-to-nearest has a mean error of {number(totals.get('rtn_mean_rel_err'))}"
        css = "good" if gain > 1.005 else "bad" if gain < 0.995 else ""
        tiles.append(_Tile("Gain over round-to-nearest", f"{gain:.2f}x", about, css))
    return tiles


def _predictions(document: Document) -> list[_Tile]:
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
            f" <code>{escaped(f'{gate.option} {gate.limit:g}')}</code>: {escaped(said)}</li>"
        )
    return section("Quality gates", f'<ul class="list">{"".join(lines)}</ul>')
