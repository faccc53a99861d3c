"""Charts of a layer's codes and scales, and of a site's input channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptq_cli.core.text import middle, number, printable
from ptq_cli.report.html import drawing
from ptq_cli.report.html.drawing import COLOURS, SERIES
from ptq_cli.report.html.subject import Channels, Distribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SLOTS = 180  # columns of the picture of a site's channels, at most


def distribution_chart(index: int, found: Distribution) -> str:
    """Histograms of codes and of scales of one layer."""
    codes, total = found.codes, max(1, int(found.codes.sum()))
    used = int((codes > 0).sum())
    ends = float(codes[[0, -1]].sum()) / total
    caption = (
        f"{printable(found.module)}: {used} of {len(codes)} codes are used, {100 * ends:.2g} % of"
        f" the weights have the lowest or the highest. {int(found.scales.sum())} scales from"
        f" {number(float(found.edges[0]))} to {number(float(found.edges[-1]))}."
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
        low, high = float(found.edges[0]), float(found.edges[-1])
        if low > 0 and high > 8 * low:
            drawing.logarithmic(right, "x", [low, high], most=3)
        else:
            right.locator_params("x", nbins=3)
            right.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        drawing.whole_numbers(right.yaxis, 4)

    title = f"Codes and scales: {_tail(found.module)}"
    return drawing.draw_chart(f"codes{index}", title, caption, draw, panels=2)


def channels_chart(index: int, found: Channels) -> str:
    """Largest absolute input of each channel of a site."""
    values = found.absmax
    middle_value = float(np.median(values))
    top = int(values.argmax())
    loud = int((values > 10 * middle_value).sum())
    after = ""
    if found.smoothed is not None:
        after = (
            f" After the smoothing factors the largest is {number(float(found.smoothed.max()))},"
            f" the median {number(float(np.median(found.smoothed)))}."
        )
    caption = (
        f"Inputs of {printable(found.site)}: {len(values)} channels, the largest is channel {top}"
        f" with {number(float(values[top]))}, {found.loudness:.3g} times the median"
        f" {number(middle_value)}. {loud} channels are above ten times the median.{after}"
    )

    def draw(axes: Axes) -> None:
        series = [(values, "rtn" if found.smoothed is not None else "ours", "inputs")]
        if found.smoothed is not None:
            series.append((found.smoothed, "ours", "smoothed"))
        every = []
        for channel, role, label in series:
            step = -(-len(channel) // _SLOTS)
            starts = np.arange(0, len(channel), step)
            peaks = np.maximum.reduceat(channel, starts).astype(float).tolist()
            shown = drawing.positive(peaks, [float(v) for v in values])
            axes.step(starts, shown, color=COLOURS[role], linewidth=1.2, where="post", label=label)
            every += shown
        if middle_value > 0:
            axes.axhline(
                middle_value, color=COLOURS["muted"], linewidth=1.2, linestyle=(0, (4, 3)),
                label="median",
            )  # fmt: skip
        drawing.logarithmic(axes, "y", every)
        drawing.whole_numbers(axes.xaxis, 6)
        axes.set(xlabel="channel", ylabel="largest |input|")

    return drawing.draw_chart(
        f"channels{index}", f"Input channels: {_tail(found.site)}", caption, draw
    )


def _tail(module: str) -> str:
    """The end of a name that tells it from others: from the block's number on."""
    parts = module.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return middle(printable(".".join(parts[start:])), 40)
