"""What all charts share: a drawing becomes a figure of the page; lines, bars, axes, ticks, legends.

A chart is drawn in colours that stand for roles ("ours", "rtn", "ink"); in its SVG each becomes a
CSS variable, so one drawing serves light and dark. Text stays text, in the page's font. The same
chart gives the same bytes: no date, no random ids, no settings of the user's.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import floor, log10
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ptq_cli.core.text import middle, number, printable
from ptq_cli.report.html.text import escaped

NARROW, WIDE = (420, 280), (1180, 320)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SERIES = tuple(f"series-{i}" for i in range(1, 9))
_ROLES = ("ink", "muted", "grid", "paper", "ours", "rtn", *SERIES)
COLOURS = {role: f"#0000{number:02x}" for number, role in enumerate(_ROLES, 1)}  # for matplotlib
_VARIABLES = {code: f"var(--{role})" for role, code in COLOURS.items()}
_MARKED = 40  # points of a line that have a mark each, at most
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12.0,  # pixels at a figure's natural size
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "legend.borderaxespad": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["grid"],
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "grid.color": COLOURS["grid"],
}


def draw_chart(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Any], None],
    *,
    wide: bool = False,
    panels: int = 1,
) -> str:
    """A `<figure>`: drawn once, or for two widths, with a legend of what has a label.

    name: begins the figure's ids; caption: what it shows, in words and numbers
    draw: is given the axes, or where there are several `panels` an array of them
    """
    sizes = {"narrow": NARROW, "wide": WIDE} if wide else {"": NARROW}
    pictures = []
    for css, (width, height) in sizes.items():
        settings: list[Any] = ["default", {**_SETTINGS, "svg.hashsalt": name + css}]
        # It complains about glyphs that its font lacks; the browser has the fonts.
        with matplotlib.style.context(settings), warnings.catch_warnings(action="ignore"):
            figure = Figure((width / 72, height / 72), layout="constrained")
            draw(figure.subplots(1, panels))
            _legend(figure)
            pictures.append(_as_svg(figure, name, css))
    own = ' class="wide"' if wide else ""
    return (
        f'<figure{own}><h3 id="{name}-title">{escaped(title)}</h3>{"".join(pictures)}'
        f'<figcaption id="{name}-caption">{escaped(caption)}</figcaption></figure>'
    )


def _as_svg(figure: Figure, name: str, css: str) -> str:
    """The figure as an `<svg>` element of an HTML page, without namespaces; call with its settings.

    name: of the chart, whose title and caption say what it shows
    """
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    root.remove(root[0])  # a style for all of the page
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _of_page(value) for key, value in element.attrib.items()}
        if element.tag == "g":
            element.attrib.pop("id", None)  # not unique on the page; nothing refers to it
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "class": f"picture {css}".strip(),
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-caption",
    }
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _of_page(value: str) -> str:
    """An attribute with two decimals, without fonts (the page has one), its colours variables."""
    value = re.sub(r"(\.\d\d)\d+", r"\1", value)
    value = re.sub(r"(font-family|stroke-linecap): [^;]*;?", "", value)
    return re.sub(r"#0000[0-9a-f]{2}", lambda code: _VARIABLES[code[0]], value)


def draw_lines(
    axes: Axes, lines: Mapping[str, Mapping[int, float]], colours: Sequence[str] = SERIES
) -> None:
    """Errors by whole numbers, a line for each label, with marks where these are few."""
    every = [value for line in lines.values() for value in line.values()]
    for i, (label, line) in enumerate(lines.items()):
        marked = len(line) <= _MARKED
        axes.plot(
            list(line), positive(list(line.values()), every), color=COLOURS[colours[i]],
            marker=MARKERS[i] if marked else None, markersize=4, linewidth=1.5,
            linestyle="-" if marked else ("-", "--", "-.", ":")[i % 4], label=label,
        )  # fmt: skip
    logarithmic(axes, "y", every)
    whole_numbers(axes.xaxis)
    axes.set_ylabel("relative error")


def draw_marks(
    axes: Axes, runs: Mapping[str, tuple[Sequence[float], Sequence[float]]], size: float
) -> None:
    """Points of several runs, by label x and y, each run in its colour and shape."""
    for i, (label, (x, y)) in enumerate(runs.items()):
        colour = COLOURS[SERIES[i]]
        axes.plot(x, y, MARKERS[i], color=colour, markersize=size, label=label)


def draw_bars(axes: Axes, values: Mapping[str, float], form: Callable[[float], str]) -> None:
    """A bar for each name, from the top, with its value in words beside it."""
    bars = axes.barh(range(len(values)), list(values.values()), color=COLOURS["ours"], height=0.62)
    behind = {"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1.5}
    axes.bar_label(bars, fmt=form, padding=5, bbox=behind)
    name_rows(axes, list(values))


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """A y axis of names, the first at the top."""
    axes.set_yticks(range(len(names)), [middle(printable(name), 18) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


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
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.yaxis if which == "y" else axes.xaxis
    ticks = _ticks(low, high, most)
    axis.set_ticks(ticks, labels=[number(tick) for tick in ticks])
    axis.set_ticks([], minor=True)
    axes.grid(axis=which, linewidth=0.8)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two positive ones: 1, 2, 5 times powers of ten, fewer where these are
    too many, evenly spaced ones where they are too few."""
    powers = range(floor(log10(low)), floor(log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(ticks) <= most:
            break
    if len(ticks) < 3:
        even = MaxNLocator(most - 1, steps=[1, 2, 5, 10]).tick_values(low, high)
        ticks = [float(tick) for tick in even if low <= tick <= high]
    return ticks[:: -(-len(ticks) // most)] if ticks else [low, high]


def count_axis(axes: Axes, count: int) -> None:
    """An x axis that counts layers from 1."""
    whole_numbers(axes.xaxis)
    axes.set_xlim(0.3, count + 0.7)
    axes.set_xlabel("layers, worst first")


def _legend(figure: Figure) -> None:
    """Above the axes, in as many columns as fit; the figure grows with the lines."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    if not names:
        return
    labels = [middle(printable(name), 26) for name in names]
    fitting = int(figure.get_figwidth() * 72 / (7 * max(map(len, labels)) + 42))
    lines = -(-len(labels) // max(1, fitting))
    columns = -(-len(labels) // lines)
    figure.set_figheight(figure.get_figheight() + 17 / 72 * (lines - 1))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def whole_numbers(axis: Axis, most: int = 8) -> None:
    """Ticks at whole numbers only, at most about so many."""
    axis.set_major_locator(MaxNLocator(most, integer=True))
