"""What was predicted of a mix of widths: a recipe's [allocation], which a report's settings keep.

It stands there to be shown: nothing is computed from it, and a recipe may do without it, or without
parts of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq_cli.core.settings import check_keys, is_amount
from ptq_cli.errors import InputError

Point = tuple[float, float]  # bits a weight, predicted cost

MOST_POINTS = 40  # of a curve, in a recipe
DIGITS = 4
# By the key of a cost: what it is called.
COSTS = {"predicted_kl": "KL", "predicted_rel_err": "sum of errors"}
_NUMBERS = (*COSTS, "bits_per_weight", "bytes")


@dataclass(frozen=True)
class Prediction:
    """What was predicted.

    cost: a key of COSTS: KL divergence in nats, or the sum of the layers' relative errors
    bits_per_weight: of the mix that `value` was predicted of
    curve: the best mix at each size; uniform: every layer at one choice, by its name
    """

    cost: str
    value: float
    bits_per_weight: float
    curve: tuple[Point, ...]
    uniform: Mapping[str, Point]

    @property
    def word(self) -> str:
        return COSTS[self.cost]

    @property
    def is_kl(self) -> bool:
        """Whether `ptq eval` can measure the same."""
        return self.cost == "predicted_kl"


def prediction_of(settings: Mapping[str, Any]) -> Prediction | None:
    """What a run's settings say was predicted; None where they say nothing that can be shown."""
    said = settings.get("allocation")
    if not isinstance(said, Mapping):
        return None
    try:
        check_allocation(said)
    except InputError:
        return None
    cost = next((key for key in COSTS if key in said), None)
    if cost is None or "bits_per_weight" not in said:
        return None
    curve = tuple((float(bits), float(worth)) for bits, worth in said.get("curve", ()))
    uniform = {
        str(name): (float(bits), float(worth))
        for name, (bits, worth) in said.get("uniform", {}).items()
    }
    return Prediction(cost, float(said[cost]), float(said["bits_per_weight"]), curve, uniform)


def check_allocation(said: Mapping[str, Any]) -> None:
    """Raises InputError where a part of it is not what `ptq allocate` writes."""
    check_keys(said, (*_NUMBERS, "curve", "uniform"), "key of [allocation]")
    for key in _NUMBERS:
        if key in said and not is_amount(said[key]):
            raise _wrong(key, said[key], "a number, 0 or more")
    curve, uniform = said.get("curve", []), said.get("uniform", {})
    if not isinstance(curve, list | tuple) or not all(map(_is_point, curve)):
        raise _wrong("curve", curve, "a list of [bits, cost]")
    if not isinstance(uniform, Mapping) or not all(map(_is_point, uniform.values())):
        raise _wrong("uniform", uniform, "a table of [bits, cost]")


def _wrong(key: str, value: object, wanted: str) -> InputError:
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:59]}…"
    hint = "remove [allocation]: it only tells what was predicted"
    return InputError(f"allocation: {key} = {shown}: not {wanted}", hint=hint)


def _is_point(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_amount, value))


def rounded(value: float) -> float:
    """With as many digits as a recipe needs."""
    return float(f"{value:.{DIGITS}g}")


def thinned(points: Sequence[Point]) -> list[list[float]]:
    """A curve for a recipe: its ends, and what is evenly spaced between them."""
    last = len(points) - 1
    count = min(len(points), MOST_POINTS)
    kept = [points[i * last // max(1, count - 1)] for i in range(count)]
    return [[rounded(bits), rounded(cost)] for bits, cost in kept]
