"""Quality gates: limits on what a report measured, passed or missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ptq_cli.core.report import LayerReport, RunReport
from ptq_cli.errors import GateMissed
from ptq_cli.report.report import row_error


@dataclass(frozen=True)
class Gate:
    """A quality gate, and how a report stands to it.

    option: "--max-rel-err"; value: what was measured, None where nothing could be
    said: what there is to say where it was missed; weak: whether that is for its inputs alone
    """

    option: str
    limit: float
    value: float | None
    passed: bool
    said: str
    weak: bool = False

    @property
    def name(self) -> str:
        return f"{self.option} {self.limit:g}"


def check_gates(gates: Sequence[Gate]) -> None:
    """Raises GateMissed with every gate that was missed."""
    missed = [f"{gate.name}: {gate.said}" for gate in gates if not gate.passed]
    if missed:
        weak = any(gate.weak for gate in gates)
        hint = "calibrate on other inputs, or --allow-weak-calibration" if weak else None
        raise GateMissed("quality gate missed: " + "; ".join(missed), hint=hint)


def gates_of(report: RunReport, allow_weak: bool = False, **limits: float) -> tuple[Gate, ...]:
    """The gates that were set, passed or missed. Those on errors are missed, too, where the inputs
    that these were measured on say little, unless `allow_weak`.

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
    return tuple(found) if allow_weak else tuple(_on_weak_inputs(gate, report) for gate in found)


def _on_weak_inputs(gate: Gate, report: RunReport) -> Gate:
    """A gate that was passed, missed for what is wrong with the inputs that it is on."""
    weak: Sequence[str] = {
        "--max-rel-err": report.weak,
        "--min-gain": report.weak,
        "--max-fallbacks": (),
    }.get(gate.option, (report.quality or {}).get("weak", ()))
    if not weak or not gate.passed:
        return gate
    measured = "nothing" if gate.value is None else f"{gate.value:.4g}"
    said = f"{measured} is measured on weak calibration: {'; '.join(weak)}"
    return replace(gate, passed=False, said=said, weak=True)


def _gate_of_rows(rows: Sequence[LayerReport], limit: float) -> Gate:
    over = [row for row in rows if not row_error(row) <= limit]
    worst = max(over or rows, key=row_error, default=None)
    if worst is None:
        return Gate("--max-rel-err", limit, None, True, "")
    error = row_error(worst)
    said = f"{len(over)} layers are above it, the worst {worst.module} with {error:.4g}"
    return Gate("--max-rel-err", limit, error, not over, said)
