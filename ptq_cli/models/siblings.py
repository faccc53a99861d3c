"""Which linears share an input, from their names alone.

Two linears of one parent module share their input where their own names stand in one row here.
"""

from __future__ import annotations

from collections.abc import Iterable

SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)

_ROW = {name: row for row in SHARED_INPUT for name in row}


def sites(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Group modules that share an input, each group in the order of its row; groups keep the order
    in which their first member came."""
    groups: dict[tuple[str, object], list[str]] = {}
    for module in modules:
        parent, _, own = module.rpartition(".")
        groups.setdefault((parent, _ROW.get(own, own)), []).append(module)
    return [tuple(_in_row_order(group)) for group in groups.values()]


def _in_row_order(group: list[str]) -> list[str]:
    row = _ROW.get(group[0].rpartition(".")[2], ())
    own = [module.rpartition(".")[2] for module in group]
    if not all(name in row for name in own):
        return group
    return [module for _, module in sorted(zip(map(row.index, own), group, strict=True))]
