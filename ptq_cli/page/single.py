"""The page of one run: headline, gates, charts, tables."""

from __future__ import annotations

from ptq_cli.display import number, size
from ptq_cli.page.charts import charts_of
from ptq_cli.page.subject import Subject
from ptq_cli.page.tables import (
    READING,
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
from ptq_cli.page.text import escaped, section


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
    document = subject.document
    totals, quality = document["totals"], document.get("quality")
    bits, ratio = totals.get("bits_per_weight"), totals.get("compression_ratio")
    shown = []
    about = [
        f"{ratio:.2f}x smaller" if ratio else "",
        f"{bits:.2f} bits per weight" if bits else "",
    ]
    sizes = f"{size(totals['bytes_before'])} \u2192 {size(totals['bytes_after'])}"
    shown.append(("Size", sizes, ", ".join(filter(None, about)), ""))
    if totals.get("mean_rel_err") is not None:
        where = measured_on(totals)
        shown.append(("Mean error", number(totals["mean_rel_err"]), where, ""))
        worst = totals.get("worst_layer") or ""
        shown.append(("Worst error", number(totals.get("worst_rel_err")), worst, ""))
    gain = totals.get("gain_vs_rtn")
    if gain is not None:
        about_rtn = f"round-to-nearest has a mean error of {number(totals.get('rtn_mean_rel_err'))}"
        css = "good" if gain > 1.005 else "bad" if gain < 0.995 else ""
        shown.append(("Gain over round-to-nearest", f"{gain:.2f}x", about_rtn, css))
    if quality is not None:
        values = quality["perplexity"]
        rise, plain = (quality["increase"][name]["perplexity"] for name in ("quantized", "rtn"))
        about_rise = f"{rise:+.3g}; round-to-nearest {plain:+.3g}"
        both = f"{values['original']:.4g} \u2192 {values['quantized']:.4g}"
        shown.append(("Perplexity", both, about_rise, ""))
    if totals.get("fallbacks"):
        said = "layers were rounded to nearest"
        shown.append(("Fallbacks", str(totals["fallbacks"]), said, "bad"))
    if subject.gates:
        missed = sum(not gate.passed for gate in subject.gates)
        words = f"{missed} missed" if missed else "all passed"
        said = f"{len(subject.gates)} gates were set"
        shown.append(("Gates", words, said, "bad" if missed else "good"))
    tiles = "".join(
        f'<div class="tile"><dt>{escaped(title)}</dt><dd><strong class="{css}">{escaped(value)}'
        f"</strong><small>{escaped(about)}</small></dd></div>"
        for title, value, about, css in shown
    )
    return f'<dl class="tiles">{tiles}</dl>'


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
