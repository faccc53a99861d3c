"""What is said of a report in words, alike on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN_INPUTS = "inputs are rounded too, and there are none to measure that on"


def measured_on(totals: Mapping[str, Any]) -> str:
    """What the errors were measured on."""
    if totals.get("heldout"):
        where = "held-out inputs"
    else:
        where = "calibration inputs" if totals.get("calibrated") else "the weights"
    rounded = totals.get("rounded_inputs")
    if rounded is None:
        return where
    return f"{where}, rounded as they run" if rounded else f"{where} ({UNKNOWN_INPUTS})"


def times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}x"


def predicted(quality: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """Of one version of the model: perplexity, what that is above the original's with its standard
    error, share of equal top tokens."""
    rise = quality["increase"][name]
    spread = rise.get("standard_error")
    return (
        f"{quality['perplexity'][name]:.4f}",
        f"{rise['perplexity']:+.3g}" + ("" if spread is None else f" ± {spread:.2g}"),
        f"{100 * quality['same_top'][name]:.1f} %",
    )


def smoothed(sites: Sequence[Mapping[str, Any]]) -> str:
    count = sum(site["fed_by"] is not None for site in sites)
    return f"{count} of {len(sites)} sites smoothed"


def cached(blocks: Sequence[Mapping[str, Any]]) -> str:
    """How much of FP8's range the keys and values of all blocks use."""
    words = []
    for what in ("keys", "values"):
        own = [block[what] for block in blocks]
        held = [each["heldout_used"] for each in own if each["heldout_used"] is not None]
        most = f", held-out tokens at most {max(held):.0%}" if held else ""
        words.append(f"{what}: every head at least {min(each['used'] for each in own):.0%}{most}")
    return f"FP8 range used by the cache: {'; '.join(words)}"


def of_site(site: Mapping[str, Any]) -> str:
    """Why a site was not smoothed, and notes."""
    return "; ".join(filter(None, (site["reason"], *site["notes"])))
