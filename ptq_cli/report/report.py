"""The error report: one row per layer, totals, what was left alone, warnings; JSON and CSV.

`report.json` in an output folder holds nothing that differs from run to run: `seconds` stand in
`--json` and `--report` only. The schema is report.schema.json beside this file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite, prod
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.core.layer import Plan, Skipped
from ptq_cli.core.names import fold_names
from ptq_cli.core.report import ActivationErrors, LayerReport, OutputErrors, RunReport
from ptq_cli.errors import GateMissed

JsonObject = Mapping[str, Any]  # a report that was written, or a part of it
# Away from a row that has none.
_OF_SOME = ("compared", "best", "activations", "input_bits", "weight_rel_err", "weak")


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


def make_report(command: str, plan: Plan, rows: Sequence[LayerReport], seconds: float) -> RunReport:
    settings = {key: value for part in plan.settings for key, value in asdict(part).items()}
    return RunReport(
        command=command,
        rows=tuple(rows),
        skipped=plan.skipped,
        totals=totals(rows, plan.skipped, plan.bytes_before, plan.bytes_after, seconds),
        warnings=(*plan.warnings, *_dead_warnings(rows)),
        settings=settings | {"method": plan.method, "format": plan.format},
    )


def _dead_warnings(rows: Sequence[LayerReport]) -> list[str]:
    """A warning where more than 1 % of a layer's input channels were zero for every token."""
    dead = [row for row in rows if row.dead_columns > 0.01 * prod(row.shape[1:])]
    if not dead:
        return []
    most = max(dead, key=lambda row: row.dead_columns / prod(row.shape[1:]))
    columns = f"{most.dead_columns} of {prod(most.shape[1:])}"
    names = fold_names([row.module for row in dead])
    return [f"{len(dead)} layers have inputs that are always zero, up to {columns}: {names}"]


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
    )


@dataclass(frozen=True)
class Gate:
    """A quality gate, and how a report stands to it.

    option: "--max-rel-err"; value: what was measured, None where nothing could be
    said: what there is to say where it was missed
    """

    option: str
    limit: float
    value: float | None
    passed: bool
    said: str

    @property
    def name(self) -> str:
        return f"{self.option} {self.limit:g}"


def check_gates(gates: Iterable[Gate]) -> None:
    """Raises GateMissed with every gate that was missed."""
    missed = [f"{gate.name}: {gate.said}" for gate in gates if not gate.passed]
    if missed:
        raise GateMissed("quality gate missed: " + "; ".join(missed))


def gates_of(report: RunReport, **limits: float) -> tuple[Gate, ...]:
    """The gates that were set, passed or missed.

    limits: max_rel_err: no layer's error may be above it; min_gain: nor the gain of the means below
        it; max_fallbacks: nor more layers than this rounded to nearest where something better was
        asked; max_perplexity_increase, max_kl: nor may perplexity rise by more, or the mean KL be
        above it
    """
    gain, fallbacks = report.totals["gain_vs_rtn"], report.totals["fallbacks"]
    shown = "not measurable" if gain is None else f"{gain:.4g}"
    measured = {
        "min_gain": (gain, f"gain_vs_rtn is {shown}"),
        "max_fallbacks": (fallbacks, f"{fallbacks} layers were rounded to nearest"),
    }
    if report.quality is not None:
        rise = report.quality["increase"]["quantized"]["perplexity"]
        kl = report.quality["kl"]["quantized"]["mean"]
        measured["max_perplexity_increase"] = rise, f"it rises by {rise:.4g}"
        measured["max_kl"] = kl, f"the mean KL divergence is {kl:.4g}"
    found = []
    for name, limit in limits.items():
        if name == "max_rel_err":
            found.append(_gate_of_rows(report.rows, limit))
        elif name in measured:
            value, said = measured[name]
            low, high = (value, limit) if name.startswith("max") else (limit, value)
            passed = value is not None and low <= high
            found.append(Gate(f"--{name.replace('_', '-')}", limit, value, passed, said))
    return tuple(found)


def _gate_of_rows(rows: Sequence[LayerReport], limit: float) -> Gate:
    over = [row for row in rows if not row_error(row) <= limit]
    worst = max(over or rows, key=row_error, default=None)
    if worst is None:
        return Gate("--max-rel-err", limit, None, True, "")
    error = row_error(worst)
    said = f"{len(over)} layers are above it, the worst {worst.module} with {error:.4g}"
    return Gate("--max-rel-err", limit, error, not over, said)
