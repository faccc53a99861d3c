"""What `ptq diff` says of two GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from ptq_cli.cli import console
from ptq_cli.cli.inspect_summary import type_counts
from ptq_cli.core.names import fold_names
from ptq_cli.core.text import number
from ptq_cli.evaluation.gguf_difference import GgufDifference


def document_of_files(found: GgufDifference) -> dict[str, Any]:
    """As JSON."""
    return {
        "same": found.same,
        "before": dict(found.before),
        "after": dict(found.after),
        "keys": {key: {"before": b, "after": a} for key, (b, a) in found.keys.items()},
        "added": list(found.added),
        "removed": list(found.removed),
        "tensors": [
            {
                "tensor": entry.tensor,
                "before": {"type": entry.before[0], "bytes": entry.before[1]},
                "after": {"type": entry.after[0], "bytes": entry.after[1]},
                "rel_diff": entry.rel_diff if isfinite(entry.rel_diff) else None,
            }
            for entry in found.tensors
        ],
    }


def show_files(found: GgufDifference, top: int) -> None:
    """On the terminal. top: tensors in the table, those that are farthest apart first; 0: all"""
    if found.same:
        console.line("no difference")
        return
    for word, side in (("before", found.before), ("after", found.after)):
        console.line(f"{word}: {_said(side)}")
    for key, (before, after) in found.keys.items():
        console.line(f"{key}: {before or 'unset'} -> {after or 'unset'}")
    for title, names in (("added", found.added), ("removed", found.removed)):
        if names:
            console.line(f"{len(names)} tensors {title}: {fold_names(names)}")
    shown = found.tensors if top <= 0 else found.tensors[:top]
    rows = [[x.tensor, x.before[0], x.after[0], number(x.rel_diff)] for x in shown]
    if rows:
        console.table(("tensor", "before", "after", "rel diff"), rows)
    if len(shown) < len(found.tensors):
        console.line(f"... and {len(found.tensors) - len(shown)} more (--top 0 shows all)")


def _said(side: Mapping[str, Any]) -> str:
    return f"{side['stated'] or 'no mix is stated'}, {type_counts(side)}"
