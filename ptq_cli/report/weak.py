"""Whether the errors of a report say anything of the model: what was wrong with the inputs that
they were measured on.

A gate on such errors fails with the reason (gates.py), since bad inputs make gains large: on what
was calibrated on, and on one input again and again, a rounding is nearly exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ptq_cli.core.names import fold_names
from ptq_cli.core.report import LayerReport
from ptq_cli.numerics.weak_inputs import (
    FEWEST_HELDOUT,
    apart_from_experts,
    without_natural_repeats,
)

Row = LayerReport | Mapping[str, Any]
FEW = 0.1  # of the layers may lack held-out inputs: the totals hardly change


def weaknesses(rows: Sequence[Row], what: str = "layers") -> tuple[str, ...]:
    """What is wrong with the inputs, as far as it matters to the totals. (An expert that few tokens
    reach does not; the notes of its rows say so.)

    rows: `module`, `calibrated`, `weak`, `heldout_rel_err` of each; what: what they are
    """
    weak = without_natural_repeats(
        {str(row["module"]): _weak(row) for row in map(_values, rows) if row["calibrated"]}
    )
    plain = apart_from_experts(weak)
    seen = [n for n, found in weak.items() if found.get("heldout") == 0 and "zero" not in found]
    few = [name for name, found in plain.items() if found.get("heldout", 0) > 0]
    zero = [name for name, found in weak.items() if "zero" in found]
    one = [name for name, found in plain.items() if "most_frequent" in found]
    again = [name for name, found in plain.items() if "repeated" in found]
    reasons = []
    if len(seen) > FEW * len(weak):
        reasons.append(
            f"no inputs are held out, errors are on those calibrated on: {_of(seen, weak, what)}"
        )
    if len(few) > len(plain) / 2:
        most = max(int(plain[name]["heldout"]) for name in few)
        reasons.append(
            f"only {most} inputs are held out, at least {FEWEST_HELDOUT} are needed:"
            f" {_of(few, weak, what)}"
        )
    if one:
        share = max(plain[name]["most_frequent"] for name in one)
        reasons.append(f"one input makes up {100 * share:.0f} % of all: {_of(one, weak, what)}")
    elif again:
        share = max(plain[name]["repeated"] for name in again)
        reasons.append(
            f"{100 * share:.0f} % of the inputs repeat earlier ones: {_of(again, weak, what)}"
        )
    if zero:
        reasons.append(f"every input is zero: {_of(zero, weak, what)}")
    return tuple(reasons)


def with_weakness(rows: Sequence[LayerReport]) -> list[LayerReport]:
    """Rows whose `weak` is what matters among all of them."""
    found = without_natural_repeats({row.module: row.weak or {} for row in rows})
    return [replace(row, weak=found[row.module] or None) for row in rows]


def _values(row: Row) -> Mapping[str, Any]:
    return row if isinstance(row, Mapping) else vars(row)


def _weak(row: Mapping[str, Any]) -> Mapping[str, float]:
    """What the row says of its inputs; where it says nothing, whether any were held out."""
    found: Mapping[str, float] | None = row.get("weak")
    if found is None:
        return {"heldout": 0} if row["heldout_rel_err"] is None else {}
    return found


def _of(names: Sequence[str], every: Mapping[str, Any], what: str) -> str:
    return f"all {what}" if len(names) == len(every) > 1 else fold_names(names)
