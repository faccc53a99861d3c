"""How much of a model's blocks stays in floating point without anybody having asked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptq_cli.core.layer import Layer, Plan, Skipped
from ptq_cli.core.names import fold_reasons
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.models.linears import OTHER_TOWER, PREDICTOR
from ptq_cli.plan.layers import cannot_hold
from ptq_cli.plan.select_tensors import IGNORED, KEPT_FLOAT, STORED_AS, UNREACHED

LIMIT = 0.2  # of the bytes of all matrices in the blocks
_WORTH_SAYING = 0.1  # of those that stay dense, for one reason
_MEANT = (IGNORED, KEPT_FLOAT, OTHER_TOWER, PREDICTOR, UNREACHED, "not quantized", "empty")


def dense_warnings(plan: Plan) -> list[str]:
    """A warning where much of the blocks stays dense: which tensors, why, and what takes them in.

    Towers of other models and what the user left out count on neither side.
    """
    dense = [entry for entry in plan.skipped if _counts(entry)]
    left, rounded = _sum(dense), _sum(plan.layers)
    if not plan.layers or left <= LIMIT * (left + rounded):
        return []
    reasons: dict[str, list[Skipped]] = {}
    for entry in dense:
        reasons.setdefault(entry.reason, []).append(entry)
    said = {why: own for why, own in reasons.items() if _sum(own) >= _WORTH_SAYING * left}
    names = {why: [entry.tensor for entry in own] for why, own in said.items()}
    return [
        f"{left / (left + rounded):.0%} of the bytes in the blocks stay in floating point:"
        f" {fold_reasons(names, 'tensors')}. {_way(plan.format, said)}"
    ]


def _way(fmt: str, reasons: Mapping[str, Sequence[Skipped]]) -> str:
    """What takes these tensors in."""
    ways = []
    if cannot_hold(fmt) in reasons:
        ways.append("--format ptq holds every layer.")
    other = [entry for why, own in reasons.items() if why != cannot_hold(fmt) for entry in own]
    if any(len(entry.shape) > 2 for entry in other) and fmt != "ptq":
        ways.append("--include REGEX --format ptq takes them in.")
    elif other:
        ways.append("--include REGEX takes them in.")
    return " ".join(ways)


def _counts(entry: Skipped) -> bool:
    """Whether it is a matrix, or several, in a block, and nobody wanted it to stay."""
    vector = len(entry.shape) < 2 or entry.tensor.endswith("bias") or entry.dtype == "BOOL"
    meant = entry.reason in _MEANT or entry.reason.startswith(STORED_AS)
    return _in_block(entry.tensor) and not vector and not meant


def _sum(tensors: Sequence[Layer] | Sequence[Skipped]) -> int:
    """Their bytes, of those in blocks."""
    return sum(
        TensorSpec(t.tensor, t.dtype, t.full_shape if isinstance(t, Layer) else t.shape).nbytes
        for t in tensors
        if _in_block(t.tensor)
    )


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
