"""Which linears share an input: what the families' table says of a model, else names alone.

Two linears of one parent module share their input where some family's site holds both their own
names (q_proj, k_proj, v_proj). A few names of families outside the table stand beside those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ptq_cli.models.families import FAMILIES
from ptq_cli.models.sites import Site

_OTHERS = (("w1", "w3"), ("query", "key", "value"), ("q", "k", "v"), ("wi_0", "wi_1"))


def _rows() -> dict[str, tuple[str, ...]]:
    """Own name → the own names of all linears of its site, in their order."""
    patterns = (pattern.linears for family in FAMILIES for pattern in family.sites)
    rows = (tuple(name.rpartition(".")[2] for name in linears) for linears in patterns)
    return {name: row for row in (*rows, *_OTHERS) if len(row) > 1 for name in row}


_ROW = _rows()


def group_modules(modules: Iterable[str], sites: Sequence[Site] = ()) -> list[tuple[str, ...]]:
    """Group modules that share an input; groups keep the order in which their first member came,
    members the order of their site.

    sites: the model's, as far as they are known; modules in none of them go by their names
    """
    order = [linear.module for site in sites for linear in site.linears]
    site_of = {linear.module: site.name for site in sites for linear in site.linears}
    rank = {module: i for i, module in enumerate(order)}
    groups: dict[object, list[str]] = {}
    for module in modules:
        parent, _, own = module.rpartition(".")
        key = site_of.get(module) or (parent, _ROW.get(own, own))
        groups.setdefault(key, []).append(module)
    return [tuple(sorted(group, key=lambda m: rank.get(m, _place(m)))) for group in groups.values()]


def _place(module: str) -> int:
    """Place of a module's own name in its row."""
    own = module.rpartition(".")[2]
    row = _ROW.get(own, ())
    return row.index(own) if own in row else 0
