"""Sites that a recipe names, for models that are of no known family.

::

    [[sites]]
    linears = ["blocks.*.attn.q", "blocks.*.attn.kv"]   # modules that share one input
    norm = "blocks.*.norm_1"                            # what feeds them, and nothing else
    plus_one = false                                    # true: its gain is stored less one

    [[sites]]
    linears = ["blocks.*.attn.out"]
    after = "blocks.*.attn.kv"       # or: the linear before, whose outputs reach them unmixed
    layout = "q k v"                 # and how they are laid out; see models/sites.py
    heads = 32                       # attention heads, where the layout has heads
    transposed = false               # true: linears are stored [in_features, out_features]

`*` stands for one number, the same in a whole entry. With neither `norm` nor `after` an entry only
says that its linears share an input. Whether the norm feeds other linears too is the recipe's word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any

from ptq_cli.core.settings import check_keys, make_settings
from ptq_cli.errors import InputError, stated_in
from ptq_cli.models.sites import Preceding, Rows, Site, SitePattern, Specs, make_site

_NOT_FED = "the recipe names nothing that feeds it"


def read_entry(entry: Mapping[str, Any]) -> SitePattern:
    """Check the keys and values of one entry.

    Raises:
        InputError: an unknown key (with the nearest known one), a value of the wrong kind, no
            linears, both `norm` and `after`.
    """
    with stated_in("[[sites]]"):
        check_keys(entry, [field.name for field in fields(SitePattern)], "key")
        made = make_settings(SitePattern, {}, entry)
    if not made.linears:
        raise InputError("[[sites]] needs linears, a list of modules")
    if made.norm and made.after:
        raise InputError(f"[[sites]] {made.linears[0]}: norm and after exclude each other")
    return made


def recipe_sites(entries: Sequence[Mapping[str, Any]], specs: Specs) -> tuple[Site, ...]:
    """The sites of all entries, `*` written out.

    Raises:
        InputError: a module that is not in the checkpoint, shapes that do not fit, a linear in two
            sites, or one norm or linear feeding two sites that would both scale it.
    """
    sites = []
    for raw in entries:
        entry = read_entry(raw)
        for numbers in _numbers(entry, specs):
            pattern = entry.named(partial(_written_out, numbers=numbers))
            site = make_site(pattern, specs, None if entry.norm or entry.after else _NOT_FED)
            if site.reason not in (None, _NOT_FED):
                hint = "see layout and heads" if entry.after and not site.missing else None
                raise InputError(f"[[sites]] {site.name}: {site.reason}", hint=hint)
            sites.append(site)
    _check_disjoint(sites)
    return tuple(sites)


def merge_sites(detected: Sequence[Site], named: Sequence[Site]) -> tuple[Site, ...]:
    """A recipe's sites, and those detected ones that share no linear with them.

    Raises:
        InputError: a recipe's norm is known to feed a linear that its entry leaves out, or one norm
            or linear feeds two sites.
    """
    for site, other in product(named, detected):
        if site.feeder is not None and _source(site) == _source(other):
            listed = {linear.module for linear in site.linears}
            for linear in other.linears:
                if linear.module not in listed:
                    raise InputError(f"{site.feeder.weight} feeds {linear.module} too")
    taken = {linear.module for site in named for linear in site.linears}
    free = [s for s in detected if not any(linear.module in taken for linear in s.linears)]
    _check_disjoint((*free, *named))
    return (*free, *named)


def _numbers(entry: SitePattern, specs: Specs) -> list[tuple[str, ...]]:
    """The numbers for which the entry's first linear is in the checkpoint, in order."""
    first = entry.linears[0]
    pattern = re.compile(re.escape(first).replace(r"\*", r"(\d+)") + r"\.weight")
    matches = [match.groups() for match in map(pattern.fullmatch, specs) if match]
    if not matches:
        raise InputError(f"[[sites]] {first}: no such module in the checkpoint")
    return sorted(matches, key=lambda numbers: [int(n) for n in numbers])


def _written_out(name: str, numbers: Sequence[str]) -> str:
    if name.count("*") not in (0, len(numbers)):
        raise InputError(f"[[sites]] {name}: as many * as in the first linear are needed")
    for number in numbers:
        name = name.replace("*", number, 1)
    return name


def _check_disjoint(sites: Sequence[Site]) -> None:
    linears: set[str] = set()
    feeders: set[object] = set()
    for site in sites:
        for linear in site.linears:
            if linear.module in linears:
                raise InputError(f"{linear.module} is in two sites")
            linears.add(linear.module)
        key = _source(site)
        if site.feeder is not None and key in feeders:
            raise InputError(f"{site.feeder.weight} feeds two sites, the second is {site.name}")
        feeders.add(key)


def _source(site: Site) -> tuple[str, Rows | None] | None:
    """The tensor, and the part of it, that feeds a site."""
    if site.feeder is None:
        return None
    return site.feeder.weight, site.feeder.rows if isinstance(site.feeder, Preceding) else None
