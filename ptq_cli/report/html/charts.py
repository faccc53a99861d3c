"""The charts of one run, and those that compare runs: what is drawn, and the same in words."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from matplotlib.axes import Axes

from ptq_cli.core.text import common_parents, number
from ptq_cli.report.html import drawing
from ptq_cli.report.html.allocation import allocation_chart
from ptq_cli.report.html.distributions import channels_chart, distribution_chart
from ptq_cli.report.html.drawing import COLOURS, SERIES
from ptq_cli.report.html.subject import Subject, worst_first
from ptq_cli.report.html.text import depth_of, kinds_of
from ptq_cli.report.report import JsonObject, row_error, row_rtn_error
from ptq_cli.report.words import times

_SINGLE = 80  # up to so many layers each has a mark of its own


def charts_of(subject: Subject) -> list[str]:
    """All charts of one run; "" where it has no data for one."""
    rows = subject.document["layers"]
    of_rows = (errors_chart, kinds_chart, depth_chart, integer_chart, compared_chart)
    return [
        *(chart(rows) for chart in of_rows if rows),
        allocation_chart(subject.document),
        blocks_chart(subject.document.get("quality")),
        *(distribution_chart(i, found) for i, found in enumerate(subject.distributions)),
        *(channels_chart(i, found) for i, found in enumerate(subject.channels)),
    ]


def charts_between(subjects: Sequence[Subject]) -> list[str]:
    """The charts that compare runs; at most as many runs as there are colours."""
    own = [s for s in subjects if s.document["layers"]][: len(SERIES)]
    return [chart(own) for chart in (trade_chart, runs_chart, runs_by_kind_chart) if own]


def errors_chart(rows: Sequence[JsonObject]) -> str:
    """Error of each layer against round-to-nearest, worst first."""
    ordered = worst_first(rows)
    ours, rtn = [row_error(row) for row in ordered], [row_rtn_error(row) for row in ordered]
    better = sum(a < b for a, b in zip(ours, rtn, strict=True))
    equal = sum(a == b for a, b in zip(ours, rtn, strict=True))
    common = common_parents([row["module"] for row in rows])
    worst = ordered[0]["module"].removeprefix(common)
    caption = (
        f"{len(ours)} layers, worst first. {better} are better than round-to-nearest at the same"
        f" grid, {equal} equal it. Errors go from {number(ours[0])} ({worst}) to"
        f" {number(ours[-1])}, median {number(median(ours))}; round-to-nearest from"
        f" {number(max(rtn))} to {number(min(rtn))}, median {number(median(rtn))}."
        f"{drawing.zeros([*ours, *rtn])}"
    )

    def draw(axes: Axes) -> None:
        x = range(1, len(ours) + 1)
        shown, plain = drawing.positive(ours, rtn), drawing.positive(rtn, ours)
        single = len(ours) <= _SINGLE
        if single:
            axes.vlines(x, shown, plain, color=COLOURS["grid"], linewidth=1.2)
        size = 5.0 if single else 2.2
        axes.plot(x, plain, "o", color=COLOURS["rtn"], markersize=size, label="round-to-nearest")
        style = {"marker": "s", "linestyle": "none"} if single else {"linewidth": 2.2}
        axes.plot(x, shown, color=COLOURS["ours"], markersize=size, label="this run", **style)
        drawing.logarithmic(axes, "y", [*shown, *plain])
        drawing.count_axis(axes, len(ours))
        axes.set_ylabel("relative error")

    return drawing.draw_chart("errors", "Error of each layer", caption, draw, wide=True)


def kinds_chart(rows: Sequence[JsonObject]) -> str:
    """Gain over round-to-nearest by kind of layer: of the mean errors."""
    gains = {}
    for kind, members in kinds_of(rows).items():
        if (ours := sum(map(row_error, members))) > 0:
            gains[kind] = sum(map(row_rtn_error, members)) / ours
    if not gains:
        return ""
    best, worst = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    words = ", ".join(f"{kind} {gain:.2f}" for kind, gain in gains.items())
    caption = (
        f"Mean error of round-to-nearest over mean error, by kind of layer: {words}. Most is gained"
        f" on {best}, least on {worst}. At 1 nothing is gained."
    )

    def draw(axes: Axes) -> None:
        drawing.draw_bars(axes, gains, times)
        axes.axvline(1, color=COLOURS["muted"], linestyle="--")
        axes.set(xlabel="gain over round-to-nearest", xlim=(0, 1.16 * max(1.0, *gains.values())))

    return drawing.draw_chart("kinds", "Gain by kind of layer", caption, draw)


def depth_chart(rows: Sequence[JsonObject]) -> str:
    """Error against the number of the block, one line for each kind of layer."""
    lines: dict[str, dict[int, float]] = {}
    for kind, members in kinds_of(rows, len(SERIES)).items():
        by_depth: dict[int, list[float]] = {}
        for row in members:
            if (depth := depth_of(row["module"])) is not None:
                by_depth.setdefault(depth, []).append(row_error(row))
        if by_depth:
            lines[kind] = {d: fmean(v) for d, v in sorted(by_depth.items())}
    depths = sorted({depth for line in lines.values() for depth in line})
    if len(depths) < 2:
        return ""
    means = {d: fmean(line[d] for line in lines.values() if d in line) for d in depths}
    top = max(means, key=means.__getitem__)
    caption = (
        f"Blocks {depths[0]} to {depths[-1]}, a line for each kind of layer ({', '.join(lines)})."
        f" The mean over the kinds goes from {number(means[depths[0]])} in the first block to"
        f" {number(means[depths[-1]])} in the last; it is largest, {number(means[top])}, in block"
        f" {top}."
    )

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, lines)
        axes.set_xlabel("block")

    return drawing.draw_chart("depth", "Error by depth", caption, draw)


def integer_chart(rows: Sequence[JsonObject]) -> str:
    """Errors with integer inputs, where they were measured."""
    known = [row for row in worst_first(rows) if row.get("activations")]
    if not known:
        return ""
    keys = {"plainly rounded": "plain", "this run": "integer", "weights alone": "weight_only"}
    parts = {
        name: [float(row["activations"][key]["rel_err"]) for row in known]
        for name, key in keys.items()
    }
    words = ", ".join(f"{name} {number(fmean(values))}" for name, values in parts.items())
    caption = (
        f"Errors of the outputs with integer inputs ({known[0]['activations']['scheme']}), layers"
        f" in the order above. Means: {words}."
    )

    def draw(axes: Axes) -> None:
        lines = {name: dict(enumerate(values, 1)) for name, values in parts.items()}
        drawing.draw_lines(axes, lines, ("rtn", "ours", SERIES[1]))
        drawing.count_axis(axes, len(known))

    return drawing.draw_chart("integer", "With integer inputs", caption, draw)


def compared_chart(rows: Sequence[JsonObject]) -> str:
    """Mean errors of the methods that were tried."""
    tried = [row for row in rows if row.get("compared")]
    names = list(dict.fromkeys(name for row in tried for name in row["compared"]))
    means = {n: fmean(r["compared"][n] for r in tried if n in r["compared"]) for n in names}
    if not means:
        return ""
    best = {name: sum(row.get("best") == name for row in tried) for name in means}
    words = ", ".join(f"{n} {number(v)} (best on {best[n]})" for n, v in means.items())
    caption = f"Mean error of each method on the same {len(tried)} layers: {words}."

    def draw(axes: Axes) -> None:
        drawing.draw_bars(axes, means, number)
        axes.set(xlabel="mean relative error", xlim=(0, 1.25 * max(means.values()) or 1))

    return drawing.draw_chart("compared", "Methods compared", caption, draw)


def blocks_chart(quality: JsonObject | None) -> str:
    """KL divergence that each block alone makes."""
    values = (quality or {}).get("kl_per_block") or []
    if not values:
        return ""
    top = max(range(len(values)), key=values.__getitem__)
    caption = (
        f"KL divergence of the predictions where one block alone is quantized, {len(values)}"
        f" blocks; largest in block {top}: {number(values[top])} nats."
    )

    def draw(axes: Axes) -> None:
        axes.bar(range(len(values)), values, color=COLOURS["ours"], width=0.7)
        drawing.whole_numbers(axes.xaxis)
        axes.set(xlabel="block", ylabel="KL, nats")

    return drawing.draw_chart("blocks", "KL divergence by block", caption, draw)


# ---- of several runs ----


def trade_chart(subjects: Sequence[Subject]) -> str:
    """Bits per weight against mean error."""
    points = {}
    for subject in subjects:
        totals = subject.document["totals"]
        bits, error = totals.get("bits_per_weight"), totals.get("mean_rel_err")
        if bits and error is not None:
            points[subject.label] = float(bits), float(error)
    if not points:
        return ""
    words = "; ".join(f"{n}: {b:.2f} bits, error {number(e)}" for n, (b, e) in points.items())
    errors = [error for _, error in points.values()]
    caption = f"Bits per weight against mean error; down and to the left is better. {words}."

    def draw(axes: Axes) -> None:
        shown = {n: ([b], drawing.positive([e], errors)) for n, (b, e) in points.items()}
        drawing.draw_marks(axes, shown, 9)
        drawing.logarithmic(axes, "y", errors)
        axes.margins(x=0.15)
        axes.set(xlabel="bits per weight", ylabel="mean relative error")

    return drawing.draw_chart("trade", "Size against error", caption + drawing.zeros(errors), draw)


def runs_chart(subjects: Sequence[Subject]) -> str:
    """Errors of all layers of each run, each sorted by itself."""
    errors = {s.label: sorted(map(row_error, s.document["layers"]))[::-1] for s in subjects}
    words = "; ".join(
        f"{label}: worst {number(own[0])}, median {number(median(own))}"
        for label, own in errors.items()
    )
    caption = f"Errors of the layers of each run, worst first. {words}."
    caption += drawing.zeros([value for own in errors.values() for value in own])

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, {n: dict(enumerate(own, 1)) for n, own in errors.items()})
        drawing.count_axis(axes, max(map(len, errors.values())))

    return drawing.draw_chart("runs", "Error of each layer", caption, draw)


def runs_by_kind_chart(subjects: Sequence[Subject]) -> str:
    """Mean error of each run by kind of layer."""
    kinds = list(kinds_of([row for s in subjects for row in s.document["layers"]], 10))
    means = {}
    for subject in subjects:
        own = kinds_of(subject.document["layers"], 10)
        means[subject.label] = {kind: fmean(map(row_error, rows)) for kind, rows in own.items()}
    words = "; ".join(
        f"{label}: " + ", ".join(f"{kind} {number(value)}" for kind, value in found.items())
        for label, found in means.items()
    )
    every = [value for found in means.values() for value in found.values()]
    caption = f"Mean error by kind of layer. {words}.{drawing.zeros(every)}"

    def draw(axes: Axes) -> None:
        shown = {}
        for label, found in means.items():
            places = [kinds.index(kind) for kind in found if kind in kinds]
            values = [value for kind, value in found.items() if kind in kinds]
            shown[label] = drawing.positive(values, every), places
        drawing.draw_marks(axes, shown, 7)
        drawing.logarithmic(axes, "x", every)
        drawing.name_rows(axes, kinds)
        axes.grid(axis="y")
        axes.set_xlabel("mean relative error")

    return drawing.draw_chart("kindruns", "Error by kind of layer", caption, draw)
