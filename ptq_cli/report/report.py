"""The error report: one row per layer, totals, what was left alone, warnings; JSON and CSV.

`report.json` in an output folder holds nothing that differs from run to run: `seconds` stand in
`--json` and `--report` only. The schema is report.schema.json beside this file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from math import isfinite, prod
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.core.layer import Plan, Skipped
from ptq_cli.core.names import fold_names
from ptq_cli.core.report import ActivationErrors, LayerReport, OutputErrors, RunReport
from ptq_cli.plan.grid_settings import GRID_KEYS
from ptq_cli.plan.mixes import is_mix
from ptq_cli.report.weak import weaknesses, with_weakness

JsonObject = Mapping[str, Any]  # a report that was written, or a part of it
# Away from a row that has none.
_OF_SOME = (
    "compared", "best", "activations", "input_bits", "weight_rel_err", "weak", "drift", "levels",
    "type", "own_tokens", "calibrated_on",
)  # fmt: skip


def totals(
    rows: Sequence[LayerReport],
    skipped: Sequence[Skipped],
    bytes_before: int,
    bytes_after: int,
    seconds: float,
) -> dict[str, Any]:
    """The totals. Means over layers; `gain_vs_rtn` is mean RTN error over mean error."""
    errors = [row_error(row) for row in rows]
    rtn_errors = [row_rtn_error(row) for row in rows]
    mean, rtn_mean = _mean(errors), _mean(rtn_errors)
    worst = max(rows, key=row_error, default=None)
    rounded = [row.weight_rel_err is not None for row in rows if row.input_bits is not None]
    return {
        "layers": len(rows),
        "left_alone": len(skipped),
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
        "compression_ratio": bytes_before / bytes_after if bytes_after else None,
        "bits_per_weight": _bits_per_weight(rows),
        "mean_rel_err": mean,
        "worst_rel_err": max(errors, default=None),
        "worst_layer": worst.module if worst else None,
        "rtn_mean_rel_err": rtn_mean,
        "gain_vs_rtn": rtn_mean / mean if mean and rtn_mean is not None else None,
        "heldout": any(row.heldout_rel_err is not None for row in rows),
        "calibrated": bool(rows) and all(row.calibrated for row in rows),
        **({"rounded_inputs": all(rounded)} if rounded else {}),
        "fallbacks": sum(row.fallback is not None for row in rows),
        "seconds": seconds,
    }


def row_error(row: LayerReport | JsonObject) -> float:
    """The error that counts: on held-out inputs where there are any. row: or its JSON"""
    return _measured(row, "heldout_rel_err", "rel_err")


def row_rtn_error(row: LayerReport | JsonObject) -> float:
    return _measured(row, "rtn_heldout_rel_err", "rtn_rel_err")


def _measured(row: LayerReport | JsonObject, *names: str) -> float:
    """The first of these numbers that is there."""
    values = row if isinstance(row, Mapping) else vars(row)
    return next(float(values[name]) for name in names if values[name] is not None)


def value_at(*place: str) -> Callable[[JsonObject], Any]:
    """What reads the value at a place of a document; None where nothing is there."""

    def read(document: JsonObject) -> Any:
        value: Any = document
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return read


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _bits_per_weight(rows: Sequence[LayerReport]) -> float | None:
    weights = sum(8 * row.bytes / row.bits_per_weight for row in rows if row.bits_per_weight)
    return 8 * sum(row.bytes for row in rows) / weights if weights else None


def make_report(
    command: str,
    plan: Plan,
    rows: Sequence[LayerReport],
    seconds: float,
    weak: Sequence[str] = (),
) -> RunReport:
    """The report of a run. weak: what is wrong with what its statistics were made from"""
    rows = with_weakness(rows)
    of_rows = weaknesses(rows)
    settings = {key: value for part in plan.settings for key, value in asdict(part).items()}
    if is_mix(settings.get("scheme", "")):  # which says the numbers of every tensor
        settings = {k: v for k, v in settings.items() if k == "scheme" or k not in GRID_KEYS}
    return RunReport(
        command=command,
        rows=tuple(rows),
        skipped=plan.skipped,
        totals=totals(rows, plan.skipped, plan.bytes_before, plan.bytes_after, seconds),
        warnings=(*plan.warnings, *dead_inputs(rows), *of_rows),
        settings=settings | {"method": plan.method, "format": plan.format},
        weak=(*weak, *of_rows),
    )


def dead_inputs(rows: Sequence[LayerReport]) -> list[str]:
    """A warning where more than 1 % of a layer's input channels were zero for every token."""
    return dead_channels({row.module: (row.dead_columns, prod(row.shape[1:])) for row in rows})


def dead_channels(counts: Mapping[str, tuple[int, int]], what: str = "layers") -> list[str]:
    """The same. counts: channels that are always zero, and all, by name; what: what they are of"""
    dead = {name: n for name, n in counts.items() if n[0] > 0.01 * n[1]}
    if not dead:
        return []
    most, width = max(dead.values(), key=lambda n: n[0] / n[1])
    return [
        f"{len(dead)} {what} have inputs that are always zero, up to {most} of {width}:"
        f" {fold_names(dead)}"
    ]


def as_document(report: RunReport, *, times: bool) -> dict[str, Any]:
    """The report as one JSON document; without `times`, the same bytes for the same run."""
    rows = [_jsonable(asdict(row)) for row in report.rows]
    document = {
        "ptq": __version__,
        "command": report.command,
        "settings": _jsonable(report.settings),
        "totals": _jsonable(report.totals),
        "layers": [
            {k: v for k, v in row.items() if v is not None or k not in _OF_SOME} for row in rows
        ],
        "left_alone": [_jsonable(asdict(entry)) for entry in report.skipped],
        "warnings": list(report.warnings),
    }
    if report.quality is not None:
        document["quality"] = _jsonable(report.quality)
    if report.sites:
        document["sites"] = _jsonable(report.sites)
    if report.weak:
        document["weak"] = list(report.weak)
    if report.kv_cache:
        document["kv_cache"] = _jsonable(report.kv_cache)
    if not times:
        for part in (document["totals"], *document["layers"]):
            del part["seconds"]
    return document


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


CSV_COLUMNS = tuple(field.name for field in fields(LayerReport))


def as_csv(report: RunReport) -> str:
    """The rows as CSV with a header line; lists are joined by spaces, None is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows([_cell(getattr(row, c)) for c in CSV_COLUMNS] for row in report.rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {item:.6g}" for key, item in value.items())
    if isinstance(value, ActivationErrors):
        return json.dumps(asdict(value))
    if isinstance(value, tuple):
        between = " " if all(isinstance(item, int) for item in value) else "; "
        return between.join(map(str, value))
    return value


def row_from_json(entry: JsonObject) -> LayerReport:
    values = _with_tuples(entry)
    if found := entry.get("activations"):
        errors = {k: OutputErrors(**v) for k, v in found.items() if k != "scheme"}
        values["activations"] = ActivationErrors(found["scheme"], **errors)
    return LayerReport(**values)


def _with_tuples(entry: JsonObject) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}


def report_from_document(document: JsonObject) -> RunReport:
    """The report that `as_document` was given; where it has no times, they are 0.

    document: one that follows report.schema.json
    """
    none = {"seconds": 0.0}
    return RunReport(
        command=document["command"],
        rows=tuple(row_from_json({**none, **row}) for row in document["layers"]),
        skipped=tuple(Skipped(**_with_tuples(entry)) for entry in document["left_alone"]),
        totals={**none, **document["totals"]},
        warnings=tuple(document["warnings"]),
        settings=document["settings"],
        quality=document.get("quality"),
        sites=tuple(document.get("sites", ())),
        weak=tuple(document.get("weak", ())),
        kv_cache=tuple(document.get("kv_cache", ())),
    )
