"""Charts of a layer's codes and scales, and of a site's input channels."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ptq_cli.core.text import middle, number
from ptq_cli.report.html import drawing
from ptq_cli.report.html.drawing import COLOURS, SERIES
from ptq_cli.report.html.subject import Channels, Distribution

_SLOTS = 180  # columns of the picture of a site's channels, at most


def distribution_chart(index: int, found: Distribution) -> str:
    """Histograms of codes and of scales of one layer."""
    codes, total = found.codes, max(1, int(found.codes.sum()))
    used = int((codes > 0).sum())
    ends = codes[[0, -1]].sum() / total
    low, high = found.edges[0], found.edges[-1]
    caption = (
        f"{found.module}: {used} of {len(codes)} codes are used, {100 * ends:.2g} % of"
        f" the weights have the lowest or the highest. {found.scales.sum()} scales from"
        f" {number(low)} to {number(high)}."
    )

    def draw(panels: Any) -> None:
        left, right = panels
        step = max(1, len(codes) // 64)
        shares = 100 * codes.reshape(-1, step).sum(axis=1) / total
        left.bar(
            np.arange(len(shares)) * step + (step - 1) / 2, shares, color=COLOURS["ours"],
            width=0.8 * step if len(shares) <= 32 else step,
        )  # fmt: skip
        left.set(xlabel="code", ylabel="% of weights")
        drawing.whole_numbers(left.xaxis, 5)
        right.stairs(found.scales, found.edges, fill=True, color=COLOURS[SERIES[2]])
        right.set(xlabel="scale", ylabel="scales")
        if low > 0 and high > 8 * low:
            drawing.logarithmic(right, "x", [low, high], most=3)
        else:
            right.locator_params("x", nbins=3)
            right.xaxis.set_major_formatter(lambda value, _: number(value))
        drawing.whole_numbers(right.yaxis, 4)

    title = f"Codes and scales: {_tail(found.module)}"
    return drawing.draw_chart(f"codes{index}", title, caption, draw, panels=2)


def channels_chart(index: int, found: Channels) -> str:
    """Largest absolute input of each channel of a site."""
    values, smoothed = found.absmax, found.smoothed
    median = float(np.median(values))
    top = int(values.argmax())
    loud = int((values > 10 * median).sum())
    after = ""
    series = [("inputs", "ours", values)]
    if smoothed is not None:
        after = (
            f" After the smoothing factors the largest is {number(float(smoothed.max()))},"
            f" the median {number(float(np.median(smoothed)))}."
        )
        series = [("inputs", "rtn", values), ("smoothed", "ours", smoothed)]
    caption = (
        f"Inputs of {found.site}: {len(values)} channels, the largest is channel {top}"
        f" with {number(float(values[top]))}, {found.loudness:.3g} times the median"
        f" {number(median)}. {loud} channels are above ten times the median.{after}"
    )

    def draw(axes: Axes) -> None:
        every = []
        starts = np.arange(0, len(values), -(-len(values) // _SLOTS))
        for label, role, channels in series:
            peaks = np.maximum.reduceat(channels, starts).astype(float).tolist()
            shown = drawing.positive(peaks, values.tolist())
            axes.step(starts, shown, color=COLOURS[role], linewidth=1.2, where="post", label=label)
            every += shown
        if median > 0:
            axes.axhline(median, color=COLOURS["muted"], linestyle="--", label="median")
        drawing.logarithmic(axes, "y", every)
        drawing.whole_numbers(axes.xaxis, 6)
        axes.set(xlabel="channel", ylabel="largest |input|")

    title = f"Input channels: {_tail(found.site)}"
    return drawing.draw_chart(f"channels{index}", title, caption, draw)


def _tail(module: str) -> str:
    """The end of a name that tells it from others: from the block's number on."""
    parts = module.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return middle(".".join(parts[start:]), 40)
