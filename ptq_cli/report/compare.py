"""What changed between two reports of one model, and whether it became worse.

A measure is worse by the fraction that it moved in its bad direction, of what it was:
`new / old − 1` for an error, `1 − new / old` for a gain. The tolerance is such a fraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import copysign, inf
from typing import Any

from ptq_cli.report.report import JsonObject, row_error, value_at
from ptq_cli.report.weak import weaknesses

# what it is called -> (what reads it from a report, whether larger is better)
_TOTALS: Mapping[str, tuple[Callable[[JsonObject], Any], bool]] = {
    "mean error": (value_at("totals", "mean_rel_err"), False),
    "worst error": (value_at("totals", "worst_rel_err"), False),
    "gain over RTN": (value_at("totals", "gain_vs_rtn"), True),
    "size in bytes": (value_at("totals", "bytes_after"), False),
    "bits per weight": (value_at("totals", "bits_per_weight"), False),
    "fallbacks": (value_at("totals", "fallbacks"), False),
    "perplexity": (value_at("quality", "perplexity", "quantized"), False),
    "mean KL": (value_at("quality", "kl", "quantized", "mean"), False),
    "equal top tokens": (value_at("quality", "same_top", "quantized"), True),
    "calibrated": (value_at("totals", "calibrated"), True),
    "held-out inputs": (value_at("totals", "heldout"), True),
}


@dataclass(frozen=True)
class Change:
    """A measure in both reports.

    worse: the fraction by which it became worse, negative where it became better; inf from nothing
    """

    name: str
    before: float
    after: float
    worse: float


@dataclass(frozen=True)
class Difference:
    """What changed.

    settings: what was set otherwise, name -> (before, after); `command` and `ptq` stand among them
    totals, layers: measures that changed at all, the worst first; layers are errors by module
    added, removed: modules that only one report has; measured: why the errors may not be compared
    weak: why the errors of a side say little
    """

    settings: Mapping[str, tuple[Any, Any]]
    totals: tuple[Change, ...]
    layers: tuple[Change, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    measured: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()

    def worse(self, tolerance: float) -> list[Change]:
        """What became worse by more than the tolerance."""
        return [change for change in (*self.totals, *self.layers) if change.worse > tolerance]

    @property
    def same(self) -> bool:
        return not (self.settings or self.totals or self.layers or self.added or self.removed)


def difference(before: JsonObject, after: JsonObject) -> Difference:
    """Compare two reports (report.schema.json)."""
    rows = [{row["module"]: row for row in document["layers"]} for document in (before, after)]
    both = [module for module in rows[0] if module in rows[1]]
    totals = ((name, of(before), of(after), better) for name, (of, better) in _TOTALS.items())
    layers = ((m, row_error(rows[0][m]), row_error(rows[1][m]), False) for m in both)
    return Difference(
        settings=_settings(before, after),
        totals=_changes(totals),
        layers=_changes(layers),
        added=tuple(module for module in rows[1] if module not in rows[0]),
        removed=tuple(module for module in rows[0] if module not in rows[1]),
        measured=tuple(_measured(before, after)),
        weak=tuple(
            f"{side}: {reason}"
            for side, document in (("before", before), ("after", after))
            for reason in _weak(document)
        ),
    )


def _weak(document: JsonObject) -> Iterable[str]:
    """What a report says of its inputs; what its rows tell, where it was made before it did."""
    said = [*document.get("weak", ()), *(document.get("quality") or {}).get("weak", ())]
    return dict.fromkeys(said or weaknesses(document["layers"]))


def _settings(before: JsonObject, after: JsonObject) -> dict[str, tuple[Any, Any]]:
    sides = [{**d["settings"], "command": d["command"], "ptq": d["ptq"]} for d in (before, after)]
    keys = sorted(sides[0].keys() | sides[1].keys())
    pairs = {key: (sides[0].get(key), sides[1].get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _measured(before: JsonObject, after: JsonObject) -> Iterator[str]:
    """What keeps errors from being comparable."""
    if not (before["layers"] and after["layers"]):
        return
    kinds = {
        "calibrated": "of outputs",
        "heldout": "on held-out inputs",
        "rounded_inputs": "of outputs with rounded inputs",
    }
    for key, text in kinds.items():
        sides = [bool(document["totals"].get(key)) for document in (before, after)]
        if sides[0] != sides[1]:
            yield f"only the errors {'before' if sides[0] else 'after'} are those {text}"


def _changes(
    measures: Iterable[tuple[str, float | None, float | None, bool]],
) -> tuple[Change, ...]:
    """The worst first, without those that did not change, or that one side has not measured.

    measures: name, before, after, whether larger is better
    """
    found = []
    for name, before, after, better in measures:
        if before is None or after is None or before == after:
            continue
        moved = float(before - after if better else after - before)
        worse = moved / abs(before) if before else copysign(inf, moved)
        found.append(Change(name, float(before), float(after), worse))
    return tuple(sorted(found, key=lambda change: (-change.worse, change.name)))
