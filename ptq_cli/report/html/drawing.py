"""What all charts share: a drawing becomes a `Chart`; lines, bars, axes, ticks, legends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import TYPE_CHECKING, Any, Literal

from ptq_cli.core.text import middle, printable
from ptq_cli.report.html.svg import SERIES, as_svg, colour, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

NARROW, WIDE = (420, 280), (1180, 320)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MARKED = 40  # points of a line that have a mark each, at most

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart on the page. caption: what it shows, in words and numbers; svgs: one per width."""

    name: str
    title: str
    caption: str
    svgs: tuple[str, ...]

    @property
    def wide(self) -> bool:
        return len(self.svgs) > 1


def draw_chart(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Any], None],
    *,
    wide: bool = False,
    panels: int = 1,
) -> Chart:
    """Draw it once, or for two widths, with a legend of what has a label.

    draw: is given the axes, or where there are several `panels` an array of them
    """
    sizes = [("narrow", NARROW), ("wide", WIDE)] if wide else [("", NARROW)]
    pictures = []
    with drawing():
        for css, (width, height) in sizes:
            figure = new_figure(width, height)
            draw(figure.subplots(1, panels))
            _legend(figure)
            ids = f"{name}-title {name}-caption"
            pictures.append(as_svg(figure, f"{name}{css}", ids, css))
    return Chart(name, title, caption, tuple(pictures))


def draw_lines(
    axes: Axes, lines: Sequence[tuple[str, Mapping[int, float]]], colours: Sequence[str] = SERIES
) -> None:
    """Errors by whole numbers, a line for each label, with marks where these are few."""
    every = [value for _, line in lines for value in line.values()]
    for i, (label, line) in enumerate(lines):
        marked = len(line) <= _MARKED
        axes.plot(
            list(line), positive(list(line.values()), every), color=colour(colours[i]),
            marker=MARKERS[i] if marked else None, markersize=4, linewidth=1.5,
            linestyle="-" if marked else ("-", "--", "-.", ":")[i % 4],
            label=middle(printable(label), 26),
        )  # fmt: skip
    logarithmic(axes, "y", every)
    whole_numbers(axes.xaxis)
    axes.set_ylabel("relative error")


def draw_bars(axes: Axes, values: Mapping[str, float], words: Sequence[str]) -> None:
    """A bar for each name, from the top, with its value in words beside it."""
    bars = axes.barh(range(len(values)), list(values.values()), color=colour("ours"), height=0.62)
    behind = {"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.5}
    axes.bar_label(bars, words, padding=5, bbox=behind)
    name_rows(axes, list(values))


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """A y axis of names, the first at the top."""
    axes.set_yticks(range(len(names)), [middle(printable(name), 18) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def positive(values: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Values for a logarithmic axis: what is 0 lies at half of the least that is not, of these and
    of what stands beside them."""
    least = min((v for v in (*values, *beside) if v > 0), default=1.0) / 2
    return [v if v > 0 else least for v in values]


def zeros(values: Sequence[float]) -> str:
    """What a caption says of them on a logarithmic axis."""
    return "" if all(value > 0 for value in values) else " An error of 0 lies at the edge."


def logarithmic(
    axes: Axes, which: Literal["x", "y"], values: Sequence[float], most: int = 6
) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5 times powers of ten."""
    shown = positive(values, values) or [1.0]
    low, high = min(shown) / 1.3, max(shown) * 1.3
    axis = axes.yaxis if which == "y" else axes.xaxis
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    (axes.set_ylim if which == "y" else axes.set_xlim)(low, high)
    axis.set_ticks(ticks := _ticks(low, high, most), labels=[_tick(tick) for tick in ticks])
    axis.set_ticks([], minor=True)
    axes.grid(axis=which, linewidth=0.8)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two positive ones: 1, 2, 5 times powers of ten, fewer where these are
    too many, evenly spaced ones where they are too few."""
    from matplotlib.ticker import MaxNLocator

    powers = range(floor(log10(low)), floor(log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(ticks) <= most:
            break
    if len(ticks) < 3:
        even = MaxNLocator(most - 1, steps=[1, 2, 5, 10]).tick_values(low, high)
        ticks = [float(tick) for tick in even if low <= tick <= high]
    return ticks[:: -(-len(ticks) // most)] if ticks else [low, high]


def _tick(value: float) -> str:
    return f"{value:.2g}" if value < 1000 else f"{value:.3g}"


def count_axis(axes: Axes, count: int) -> None:
    """An x axis that counts layers from 1."""
    whole_numbers(axes.xaxis)
    axes.set_xlim(0.3, max(count, 1) + 0.7)
    axes.set_xlabel("layers, worst first")


def _legend(figure: Figure) -> None:
    """Above the axes, in as many columns as fit; the figure grows with the lines."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if not labels:
        return
    fitting = int(figure.get_figwidth() * 72 / (7 * max(map(len, labels)) + 42))
    lines = -(-len(labels) // max(1, fitting))
    columns = -(-len(labels) // lines)
    figure.set_figheight(figure.get_figheight() + 17 / 72 * (lines - 1))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def whole_numbers(axis: Axis, most: int = 8) -> None:
    """Ticks at whole numbers only, at most about so many."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True))
