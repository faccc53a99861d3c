"""The charts of one run: what is drawn, and the same in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from ptq_cli.core.text import middle, number, printable
from ptq_cli.report.html.distributions import channels_chart, distribution_chart
from ptq_cli.report.html.drawing import (
    MARKERS,
    SINGLE,
    Chart,
    Row,
    count_axis,
    dashes,
    draw_chart,
    legend,
    logarithmic,
    mean,
    optional,
    positive,
    short,
    whole_numbers,
    zeros,
)
from ptq_cli.report.html.names import depth_of, kinds_of
from ptq_cli.report.html.subject import Subject, error_of, rtn_error_of, worst_first
from ptq_cli.report.html.svg import SERIES, colour

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_KINDS = len(SERIES)


def charts_of(subject: Subject) -> list[Chart]:
    """All charts that one run has data for."""
    rows = subject.document["layers"]
    found: list[Chart] = []
    if rows:
        found += [errors_chart(rows), *optional(kinds_chart(rows), depth_chart(rows))]
        found += optional(integer_chart(rows), compared_chart(rows))
    found += optional(blocks_chart(subject.document.get("quality")))
    found += [distribution_chart(i, d) for i, d in enumerate(subject.distributions)]
    found += [channels_chart(i, c) for i, c in enumerate(subject.channels)]
    return found


def errors_chart(rows: Sequence[Row]) -> Chart:
    """Error of each layer against round-to-nearest, worst first."""
    ordered = worst_first(rows)
    ours, rtn = [error_of(row) for row in ordered], [rtn_error_of(row) for row in ordered]
    better = sum(a < b for a, b in zip(ours, rtn, strict=True))
    equal = sum(a == b for a, b in zip(ours, rtn, strict=True))
    caption = (
        f"{len(ours)} layers, worst first. {better} are better than round-to-nearest at the same"
        f" grid, {equal} equal it. Errors go from {number(ours[0])} ({short(rows, ordered[0])}) to"
        f" {number(ours[-1])}, median {number(median(ours))}; round-to-nearest from"
        f" {number(max(rtn))} to {number(min(rtn))}, median {number(median(rtn))}."
        f"{zeros([*ours, *rtn])}"
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        x = range(1, len(ours) + 1)
        shown, plain = positive(ours, rtn), positive(rtn, ours)
        single = len(ours) <= SINGLE
        if single:
            axes.vlines(x, shown, plain, color=colour("grid"), linewidth=1.2)
        size = 5.0 if single else 2.2
        axes.plot(x, plain, "o", color=colour("rtn"), markersize=size, label="round-to-nearest")
        style = {"marker": "s", "linestyle": "none"} if single else {"linewidth": 2.2}
        axes.plot(x, shown, color=colour("ours"), markersize=size, label="this run", **style)
        logarithmic(axes, "y", [*shown, *plain])
        count_axis(axes, len(ours))
        axes.set_xlabel("layers, worst first")
        axes.set_ylabel("relative error")
        legend(figure, axes)

    return draw_chart("errors", "Error of each layer", caption, draw, wide=True)


def kinds_chart(rows: Sequence[Row]) -> Chart | None:
    """Gain over round-to-nearest by kind of layer: of the mean errors."""
    gains = {}
    for kind, members in kinds_of(rows).items():
        ours = sum(error_of(row) for row in members)
        if ours > 0:
            gains[kind] = sum(rtn_error_of(row) for row in members) / ours
    if not gains:
        return None
    best, worst = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    words = ", ".join(f"{kind} {gain:.2f}" for kind, gain in gains.items())
    caption = (
        f"Mean error of round-to-nearest over mean error, by kind of layer: {words}. Most is gained"
        f" on {best}, least on {worst}. At 1 nothing is gained."
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(gains)
        bars = axes.barh(range(len(names)), list(gains.values()), color=colour("ours"), height=0.62)
        behind = {"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.5}
        axes.bar_label(bars, [f"{gain:.2f}x" for gain in gains.values()], padding=5, bbox=behind)
        axes.axvline(1, color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(names)), [middle(printable(name), 18) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.16 * max(1.0, *gains.values()))
        axes.set_xlabel("gain over round-to-nearest")
        axes.tick_params(axis="y", length=0)

    return draw_chart("kinds", "Gain by kind of layer", caption, draw)


def depth_chart(rows: Sequence[Row]) -> Chart | None:
    """Error against the number of the block, one line for each kind of layer."""
    lines: dict[str, dict[int, float]] = {}
    for kind, members in kinds_of(rows, _MOST_KINDS).items():
        by_depth: dict[int, list[float]] = {}
        for row in members:
            depth = depth_of(row["module"])
            if depth is not None:
                by_depth.setdefault(depth, []).append(error_of(row))
        if by_depth:
            lines[kind] = {d: sum(v) / len(v) for d, v in sorted(by_depth.items())}
    depths = sorted({depth for line in lines.values() for depth in line})
    if len(depths) < 2:
        return None
    means = {d: mean([line[d] for line in lines.values() if d in line]) for d in depths}
    top = max(means, key=means.__getitem__)
    caption = (
        f"Blocks {depths[0]} to {depths[-1]}, a line for each kind of layer ({', '.join(lines)})."
        f" The mean over the kinds goes from {number(means[depths[0]])} in the first block to"
        f" {number(means[depths[-1]])} in the last; it is largest, {number(means[top])}, in block"
        f" {top}."
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        every = [value for line in lines.values() for value in line.values()]
        for i, (kind, line) in enumerate(lines.items()):
            axes.plot(
                list(line), positive(list(line.values()), every), color=colour(SERIES[i]),
                marker=MARKERS[i] if len(depths) <= 40 else None, markersize=5, linewidth=1.5,
                linestyle=dashes(i, len(depths)),
                label=middle(printable(kind), 12),
            )  # fmt: skip
        logarithmic(axes, "y", every)
        whole_numbers(axes.xaxis)
        axes.set_xlabel("block")
        axes.set_ylabel("relative error")
        legend(figure, axes)

    return draw_chart("depth", "Error by depth", caption, draw)


def integer_chart(rows: Sequence[Row]) -> Chart | None:
    """Errors with integer inputs, where they were measured."""
    known = [row for row in worst_first(rows) if row.get("activations")]
    parts = {
        name: [float(row["activations"][key]["rel_err"]) for row in known]
        for name, key in (
            ("plainly rounded", "plain"),
            ("this run", "integer"),
            ("weights alone", "weight_only"),
        )
    }
    if not known:
        return None
    words = ", ".join(f"{name} {number(mean(values))}" for name, values in parts.items())
    caption = (
        f"Errors of the outputs with integer inputs ({known[0]['activations']['scheme']}), layers"
        f" in the order above. Means: {words}."
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        every = [value for values in parts.values() for value in values]
        roles = ("rtn", "ours", SERIES[1])
        for i, (name, values) in enumerate(parts.items()):
            axes.plot(
                range(1, len(values) + 1), positive(values, every), color=colour(roles[i]),
                marker=MARKERS[i] if len(values) <= SINGLE else None, markersize=4,
                linewidth=1.3, linestyle=dashes(i, len(values), SINGLE), label=name,
            )  # fmt: skip
        logarithmic(axes, "y", every)
        count_axis(axes, len(known))
        axes.set_xlabel("layers, worst first")
        axes.set_ylabel("relative error")
        legend(figure, axes)

    return draw_chart("integer", "With integer inputs", caption, draw)


def compared_chart(rows: Sequence[Row]) -> Chart | None:
    """Mean errors of the methods that were tried."""
    tried = [row for row in rows if row.get("compared")]
    names = list(dict.fromkeys(name for row in tried for name in row["compared"]))
    means = {n: mean([r["compared"][n] for r in tried if n in r["compared"]]) for n in names}
    if not means:
        return None
    best = {name: sum(row.get("best") == name for row in tried) for name in means}
    words = ", ".join(f"{n} {number(v)} (best on {best[n]})" for n, v in means.items())
    caption = f"Mean error of each method on the same {len(tried)} layers: {words}."

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(range(len(means)), list(means.values()), color=colour("ours"), height=0.6)
        axes.bar_label(bars, [number(value) for value in means.values()], padding=4)
        axes.set_yticks(range(len(means)), [middle(printable(name), 18) for name in means])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(means.values()) or 1)
        axes.set_xlabel("mean relative error")
        axes.tick_params(axis="y", length=0)

    return draw_chart("compared", "Methods compared", caption, draw)


def blocks_chart(quality: Mapping[str, Any] | None) -> Chart | None:
    """KL divergence that each block alone makes."""
    values = (quality or {}).get("kl_per_block") or []
    if not values:
        return None
    top = max(range(len(values)), key=values.__getitem__)
    caption = (
        f"KL divergence of the predictions where one block alone is quantized, {len(values)}"
        f" blocks; largest in block {top}: {number(values[top])} nats."
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(range(len(values)), values, color=colour("ours"), width=0.7)
        whole_numbers(axes.xaxis)
        axes.set_xlabel("block")
        axes.set_ylabel("KL, nats")

    return draw_chart("blocks", "KL divergence by block", caption, draw)
