"""The charts that compare several runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from ptq_cli.core.text import middle, number, printable
from ptq_cli.report.html.drawing import (
    MARKERS,
    Chart,
    count_axis,
    dashes,
    draw_chart,
    legend,
    logarithmic,
    mean,
    optional,
    positive,
    zeros,
)
from ptq_cli.report.html.names import kinds_of
from ptq_cli.report.html.subject import Subject, error_of
from ptq_cli.report.html.svg import SERIES, colour

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def charts_between(subjects: Sequence[Subject]) -> list[Chart]:
    """The charts that compare runs; at most as many as there are colours."""
    own = [s for s in subjects if s.document["layers"]][: len(SERIES)]
    if not own:
        return []
    return optional(trade_chart(own), runs_chart(own), runs_by_kind_chart(own))


def trade_chart(subjects: Sequence[Subject]) -> Chart | None:
    """Bits per weight against mean error."""
    points = [
        (s.label, float(t["bits_per_weight"]), float(t["mean_rel_err"]))
        for s in subjects
        for t in (s.document["totals"],)
        if t.get("bits_per_weight") and t.get("mean_rel_err") is not None
    ]
    if not points:
        return None
    words = "; ".join(f"{printable(n)}: {b:.2f} bits, error {number(e)}" for n, b, e in points)
    caption = f"Bits per weight against mean error; down and to the left is better. {words}."
    caption += zeros([error for *_, error in points])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        errors = [error for *_, error in points]
        for i, (name, bits, error) in enumerate(points):
            axes.plot(
                [bits], positive([error], errors), MARKERS[i], color=colour(SERIES[i]),
                markersize=9, label=middle(printable(name), 26),
            )  # fmt: skip
        logarithmic(axes, "y", errors)
        axes.margins(x=0.15)
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("mean relative error")
        legend(figure, axes)

    return draw_chart("trade", "Size against error", caption, draw)


def runs_chart(subjects: Sequence[Subject]) -> Chart:
    """Errors of all layers of each run, each sorted by itself."""
    sorted_errors = {
        i: sorted((error_of(row) for row in s.document["layers"]), reverse=True)
        for i, s in enumerate(subjects)
    }
    words = "; ".join(
        f"{printable(subjects[i].label)}: worst {number(v[0])}, median {number(median(v))}"
        for i, v in sorted_errors.items()
    )
    caption = f"Errors of the layers of each run, worst first. {words}."
    caption += zeros([value for values in sorted_errors.values() for value in values])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        every = [value for values in sorted_errors.values() for value in values]
        for i, values in sorted_errors.items():
            axes.plot(
                range(1, len(values) + 1), positive(values, every), color=colour(SERIES[i]),
                marker=MARKERS[i] if len(values) <= 40 else None, markersize=4, linewidth=1.6,
                linestyle=dashes(i, len(values)),
                label=middle(printable(subjects[i].label), 26),
            )  # fmt: skip
        logarithmic(axes, "y", every)
        count_axis(axes, max(map(len, sorted_errors.values())))
        axes.set_xlabel("layers, worst first")
        axes.set_ylabel("relative error")
        legend(figure, axes)

    return draw_chart("runs", "Error of each layer", caption, draw)


def runs_by_kind_chart(subjects: Sequence[Subject]) -> Chart | None:
    """Mean error of each run by kind of layer."""
    rows = [row for s in subjects for row in s.document["layers"]]
    kinds = list(kinds_of(rows, 10))
    means = {
        i: {
            k: mean([error_of(r) for r in m]) for k, m in kinds_of(s.document["layers"], 10).items()
        }
        for i, s in enumerate(subjects)
    }
    words = "; ".join(
        f"{printable(subjects[i].label)}: "
        + ", ".join(f"{k} {number(v)}" for k, v in found.items())
        for i, found in means.items()
    )
    caption = f"Mean error by kind of layer. {words}."
    caption += zeros([value for found in means.values() for value in found.values()])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        every = [value for found in means.values() for value in found.values()]
        for i, found in means.items():
            places = [kinds.index(kind) for kind in found if kind in kinds]
            values = [value for kind, value in found.items() if kind in kinds]
            axes.plot(
                positive(values, every), places, MARKERS[i], color=colour(SERIES[i]),
                markersize=7, label=middle(printable(subjects[i].label), 26),
            )  # fmt: skip
        logarithmic(axes, "x", every)
        axes.set_yticks(range(len(kinds)), [middle(printable(kind), 18) for kind in kinds])
        axes.invert_yaxis()
        axes.grid(axis="y")
        axes.set_xlabel("mean relative error")
        axes.tick_params(axis="y", length=0)
        legend(figure, axes)

    return draw_chart("kindruns", "Error by kind of layer", caption, draw)
