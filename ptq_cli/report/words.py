"""What is said of a report in words, alike on the terminal and on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ptq_cli.core.text import number
from ptq_cli.plan.prediction import Prediction

SAME_BITS = 0.005  # a mix that differs by more in its bits is not the one that was predicted
_FLOATS = {"e2m1": "FP4", "e4m3": "FP8"}

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


def kl_measured(quality: Mapping[str, Any] | None) -> str | None:
    """Mean KL divergence with its standard error; None where no predictions were measured."""
    if quality is None:
        return None
    own = quality["kl"]["quantized"]
    spread = own.get("standard_error")
    return number(own["mean"]) + ("" if spread is None else f" ± {spread:.2g}")


def beside_measured(
    prediction: Prediction, totals: Mapping[str, Any], quality: Mapping[str, Any] | None
) -> str:
    """What was predicted of a mix of widths, and what was measured."""
    said = f"predicted {prediction.word} {number(prediction.value)}"
    found, bits = prediction.bits_per_weight, totals.get("bits_per_weight")
    if bits is not None and abs(bits - found) > SAME_BITS * found:
        said += f" of another mix, {found:.2f} bits/weight"
    measured = kl_measured(quality) if prediction.is_kl else None
    return said if measured is None else f"{said}, measured {measured}"


def numbers_of(row: Mapping[str, Any]) -> str:
    """A short word for a layer's numbers: ggml's type, FP4 and FP8, else W4A16. row: as JSON"""
    if name := row.get("type") or _FLOATS.get(row.get("levels") or ""):
        return str(name)
    return f"W{row['bits']}A{row.get('input_bits') or 16}"


def mixed(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many layers have which numbers, where these differ, or have names."""
    counted = Counter(map(numbers_of, rows)).most_common()
    if len(counted) < 2 and not any(row.get("type") for row in rows):
        return ""
    return f" ({', '.join(f'{count} {name}' for name, count in counted)})"


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
