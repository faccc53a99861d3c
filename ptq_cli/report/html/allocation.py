"""A mix of widths: how many layers have which, what was predicted at each size, what was chosen,
and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import itemgetter
from statistics import fmean

from matplotlib.axes import Axes

from ptq_cli.core.text import number
from ptq_cli.plan.prediction import Prediction, prediction_of
from ptq_cli.report.html import drawing
from ptq_cli.report.html.drawing import COLOURS, SERIES
from ptq_cli.report.html.tables import Column, table
from ptq_cli.report.report import JsonObject, row_error, value_at
from ptq_cli.report.words import kl_measured, numbers_of

_MEASURED = value_at("quality", "kl", "quantized", "mean")


def allocation_chart(document: JsonObject) -> str:
    """Bits per weight against predicted cost; "" where nothing was predicted."""
    found = prediction_of(document["settings"])
    if found is None or not found.curve:
        return ""
    chosen, bits = (found.bits_per_weight, found.value), document["totals"].get("bits_per_weight")
    kl = _MEASURED(document) if found.is_kl else None
    points = {"one choice for all": list(found.uniform.values()), "chosen": [chosen]}
    points["measured"] = [] if kl is None or bits is None else [(float(bits), float(kl))]
    costs = [cost for own in (found.curve, *points.values()) for _, cost in own]

    def draw(axes: Axes) -> None:
        x, y = zip(*found.curve, strict=True)
        axes.plot(x, drawing.positive(y, costs), color=COLOURS["ours"], label="best mix")
        roles = (("s", "rtn", 6), ("o", SERIES[1], 9), ("D", SERIES[2], 6))
        for (label, own), (marker, role, size) in zip(points.items(), roles, strict=True):
            if own:
                x, y = zip(*own, strict=True)
                shown = drawing.positive(y, costs)
                axes.plot(x, shown, marker, color=COLOURS[role], markersize=size, label=label)
        drawing.logarithmic(axes, "y", costs)
        unit = ", nats" if found.is_kl else ""
        axes.set(xlabel="bits per weight", ylabel=f"predicted {found.word}{unit}")

    title = f"Bits against predicted {found.word}"
    return drawing.draw_chart("allocation", title, _caption(found, document), draw)


def _caption(found: Prediction, document: JsonObject) -> str:
    (first, worst), (last, best) = found.curve[0], found.curve[-1]
    uniform = ", ".join(
        f"{name} {number(cost)} at {bits:.2f}" for name, (bits, cost) in found.uniform.items()
    )
    measured = kl_measured(document.get("quality")) if found.is_kl else None
    return (
        f"Predicted {found.word} of the best mix at each size, from {number(worst)} at"
        f" {first:.2f} bits per weight to {number(best)} at {last:.2f}. Chosen:"
        f" {number(found.value)} at {found.bits_per_weight:.2f}."
        + (f" One choice for all layers: {uniform}." if uniform else "")
        + (f" Measured: {measured}." if measured else "")
    )


def mix_table(rows: Sequence[JsonObject]) -> str:
    """How many layers have which numbers, where these differ; the widest first."""
    found: dict[str, list[JsonObject]] = {}
    for row in sorted(rows, key=lambda row: (-row["bits_per_weight"], numbers_of(row))):
        found.setdefault(numbers_of(row), []).append(row)
    if len(found) < 2:
        return ""
    sizes = {name: sum(prod(row["shape"]) for row in own) for name, own in found.items()}
    total = max(1, sum(sizes.values()))
    columns = [
        Column("Numbers", itemgetter(0), "name"),
        Column("Layers", lambda entry: len(entry[1]), form=str),
        Column("Weights", lambda entry: sizes[entry[0]] / total, form="{:.1%}".format),
        Column("Mean error", lambda entry: fmean(map(row_error, entry[1]))),
    ]
    return table(columns, list(found.items()), "Mix of widths")
