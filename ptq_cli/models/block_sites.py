"""The sites of a block, from its family's names and the tensors that it holds.

A family may have several kinds of blocks: with attention or something else, with an MLP or experts,
with other norms. A block is of the kind of which it lacks the fewest modules.

In a mixture the norm before the router feeds the router, the first linears of all experts and of
the shared ones, and the gate of these: one site, whose factors every reader of the norm takes. The
last linear of each expert is a site of its own. There are as many experts as the router has rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ptq_cli.models.family import Family, FamilySite, Folds
from ptq_cli.models.names import ExpertNames, Names
from ptq_cli.models.sites import Specs

Kind = tuple[FamilySite, ...]

_NO_NORM = "no norm feeds it"


@dataclass(frozen=True)
class BlockSites:
    """The sites of one block, by inner names, experts written out.

    sites: in the order in which they are computed
    experts: the experts' modules, "mlp.experts.0", …
    stacked: tensors that hold all experts in one
    """

    sites: tuple[FamilySite, ...]
    experts: frozenset[str]
    stacked: tuple[str, ...]

    @property
    def linears(self) -> list[str]:
        return [linear for site in self.sites for linear in site.linears]

    @property
    def modules(self) -> list[str]:
        return [*self.linears, *(site.norm for site in self.sites if site.norm)]

    def missing(self, tensors: Collection[str]) -> int:
        """How many of its modules a block lacks. tensors: their inner names"""
        return sum(f"{module}.weight" not in tensors for module in self.modules)


def block_sites(family: Family, tensors: Specs) -> BlockSites:
    """The sites of a block. tensors: its headers by inner names"""
    names = family.names.experts
    experts = [] if names is None else _experts(names, tensors)
    stacked = () if names is None else _stacked(names, tensors)
    found = [
        BlockSites(_written_out(kind, experts, stacked), frozenset(experts), stacked)
        for kind in kinds(family)
    ]
    return min(found, key=lambda kind: kind.missing(tensors))


def kinds(family: Family) -> tuple[Kind, ...]:
    """The sites of each kind of block, by inner names."""
    folds = family.folds
    return tuple(
        tuple(
            replace(site, plus_one=family.plus_one, transposed=family.transposed)
            for site in _merged((*attention, *mlp))
        )
        for norms in (family.names.norms, *folds.norms)
        for names in (replace(family.names, norms=norms),)
        for attention in folds.attentions or (attention_sites(names, folds),)
        for mlp in _mlps(names, folds)
    )


def attention_sites(names: Names, folds: Folds) -> Kind:
    """q, k and v behind their norm, and the output linear behind the values."""
    return (
        _behind_norm(names.qkv, names.norms.get("attention_in"), folds),
        FamilySite((names.output,), after=names.qkv[-1], layout=folds.values),
    )


def _mlps(names: Names, folds: Folds) -> list[Kind]:
    """The MLP, and the experts that stand in its place."""
    norm = names.norms.get("mlp_in")
    found: list[Kind] = []
    if names.mlp_in:
        behind = _behind_linear(names.mlp_out, names.mlp_in[-1], folds)
        found.append((_behind_norm(names.mlp_in, norm, folds), behind))
    if experts := names.experts:
        inside = [name for name in (experts.shared, experts.expert) if name]
        readers = (f"{expert}.{name}" for expert in inside for name in experts.inputs)
        ends = (
            _behind_linear(f"{expert}.{experts.output}", f"{expert}.{experts.inputs[-1]}", folds)
            for expert in inside
        )
        found.append((_behind_norm((*experts.routers, *readers), norm, folds), *ends))
    return found


def _behind_norm(linears: tuple[str, ...], norm: str | None, folds: Folds) -> FamilySite:
    if norm is None:
        return FamilySite(linears, reason=_NO_NORM)
    return FamilySite(linears, norm=norm, condition=folds.norm_if)


def _behind_linear(linear: str, before: str, folds: Folds) -> FamilySite:
    if folds.inner_reason is not None:
        return FamilySite((linear,), layout=folds.inner, reason=folds.inner_reason)
    return FamilySite((linear,), after=before, layout=folds.inner, condition=folds.inner_if)


def _merged(sites: Sequence[FamilySite]) -> list[FamilySite]:
    """Sites that one norm feeds are one: attention and MLP may stand side by side."""
    found: list[FamilySite] = []
    for site in sites:
        same = next((x for x in found if site.norm and x.norm == site.norm), None)
        if same is None:
            found.append(site)
        else:
            joined = replace(same, linears=(*same.linears, *site.linears))
            found[found.index(same)] = joined
    return found


def _experts(names: ExpertNames, tensors: Specs) -> list[str]:
    """The experts of a block, as many as its router has rows, or else as their names tell."""
    if router := tensors.get(f"{names.router}.weight"):
        return [names.expert.format(number) for number in range(router.shape[0])]
    numbered = re.compile(re.escape(names.expert).replace(r"\{\}", r"(\d+)") + r"\..*")
    numbers = [int(match[1]) for match in map(numbered.fullmatch, tensors) if match]
    return [names.expert.format(number) for number in range(max(numbers, default=0) + 1)]


def _stacked(names: ExpertNames, tensors: Specs) -> tuple[str, ...]:
    """Tensors among the experts that belong to none of them."""
    inside = names.expert.partition("{}")[0]
    return tuple(
        name
        for name in tensors
        if name.startswith(inside) and not name.removeprefix(inside)[:1].isdigit()
    )


def _written_out(kind: Kind, experts: Sequence[str], stacked: Sequence[str]) -> Kind:
    """The sites with all experts; those of one expert each, none of experts that are stacked."""
    numbers = [] if stacked else list(range(len(experts)))
    found: list[FamilySite] = []
    for site in kind:
        if not any("{}" in linear for linear in site.linears):
            found.append(site)
        elif any("{}" not in linear for linear in site.linears):
            found.append(_joined(site, numbers, stacked))
        else:
            found += (site.named(_numbered(number)) for number in numbers)
    return tuple(found)


def _joined(site: FamilySite, numbers: Sequence[int], stacked: Sequence[str]) -> FamilySite:
    """A site with the linears of all experts behind those that belong to none."""
    alone = tuple(linear for linear in site.linears if "{}" not in linear)
    inside = [linear for linear in site.linears if "{}" in linear]
    routed = tuple(linear.format(number) for number in numbers for linear in inside)
    reason = f"{stacked[0]} holds all experts in one tensor" if stacked else site.reason
    return replace(site, linears=(*alone, *routed), reason=reason)


def _numbered(number: int) -> Callable[[str], str]:
    return lambda name: name.format(number)
