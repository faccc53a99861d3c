"""The sites of a checkpoint, from its config.json and the names and shapes in its headers.

config.json's `model_type` decides the family; without one the names do, and what they cannot tell
is said in the notes. Of a family that nobody knows sites are derived (models/derived_sites.py):
these say what shares an input, and nothing takes factors there. A block that holds a tensor its
family does not know is left alone: that tensor may read the same norm (a router, an adapter), and a
fold would change it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.core.text import nearest_or_all
from ptq_cli.errors import InputError
from ptq_cli.models.block_sites import BlockSites, block_sites, kinds
from ptq_cli.models.derived_sites import DerivedSite, derive_sites
from ptq_cli.models.families import FAMILIES, TOLD_BY_NAMES, text_type
from ptq_cli.models.family import Condition, Config, Family, FamilySite
from ptq_cli.models.sites import Site, Specs, make_site, misfit

_BY_NAME = {family.name: family for family in FAMILIES}
_BY_MODEL_TYPE = {kind: family for family in FAMILIES for kind in family.model_types}


@dataclass(frozen=True)
class Sites:
    """family: None where none fits; notes: what was assumed, or why there are no sites."""

    family: str | None
    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Block:
    """A decoder block of a family: `path` with its dot ("model.layers.3."), `beside`, the prefix of
    what stands beside the blocks ("model."), the inner names of its tensors, and its sites by inner
    names."""

    family: Family
    path: str
    beside: str
    tensors: frozenset[str]
    inner: BlockSites

    @property
    def patterns(self) -> list[FamilySite]:
        """The family's sites with full names."""
        return [site.named(lambda module: self.path + module) for site in self.inner.sites]

    @cached_property
    def experts(self) -> frozenset[str]:
        return frozenset(self.path + expert for expert in self.inner.experts)

    @cached_property
    def strangers(self) -> list[str]:
        """Tensors of the block that the family does not know."""
        names = self.family.names
        modules = (*self.inner.modules, *names.dense)
        known = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
        known |= {*names.other_norms, *names.buffers, *self.inner.stacked}
        return sorted(self.tensors - known)

    @property
    def whole(self) -> bool:
        """Whether it has all linears of its kind."""
        return self.tensors.issuperset(f"{linear}.weight" for linear in self.inner.linears)


def find_sites(specs: Specs, config: Config | None = None, family: str | None = None) -> Sites:
    """The sites of all blocks, in the order of the blocks.

    specs: the headers of the whole checkpoint
    config: config.json; a multimodal model's `text_config` is looked into
    family: a family's name, which then goes before config.json and names

    Raises:
        InputError: `family` is none of the table's, or no block of the checkpoint is of it.
    """
    kind = None
    if config is not None:
        kind = text_type(config)
    row, notes = (_named(family, kind), ()) if family is not None else _choose(specs, kind)
    if row is None:
        derived = tuple(_shared(site, specs) for site in derive_sites(specs, config or {}))
        return Sites(None, derived, (*notes, *_how_sure(derived)))
    blocks = _blocks(specs, row)
    if not blocks:
        message = f"no block of the checkpoint has the linears of a {row.name} model"
        if family is not None:
            raise InputError(message)
        return Sites(None, (), (*notes, message))
    for mark in row.marks if family is not None else ():
        if not any(mark in block.tensors for block in blocks):
            raise InputError(f"family {row.name}: no block of the checkpoint has a {mark}")
    settings = None if config is None else row.settings(config)
    sites = tuple(site for block in blocks for site in _sites(block, settings, specs))
    return Sites(row.name, sites, (*notes, *(_assumed(row) if config is None else ())))


def _shared(derived: DerivedSite, specs: Specs) -> Site:
    """A derived site, as far as it says what shares an input."""
    pattern = replace(derived.pattern, norm="", after="")
    site = make_site(pattern, specs, f"{derived.why}; what feeds it is for a recipe to say")
    return replace(site, certainty=derived.certainty)


def _how_sure(sites: Sequence[Site]) -> tuple[str, ...]:
    counted = Counter(site.certainty for site in sites)
    said = ", ".join(f"{counted[c]} {c}" for c in ("sure", "likely", "guess") if counted[c])
    return (f"sites by names and shapes (ptq inspect --sites): {said}",) if sites else ()


def _named(name: str, kind: str | None) -> Family:
    """The family of that name, where config.json does not say otherwise."""
    if name not in _BY_NAME:
        hint = nearest_or_all(name, sorted(_BY_NAME))
        raise InputError(f"family {name!r} is not known", hint=hint)
    if kind in _BY_MODEL_TYPE and kind not in _BY_NAME[name].model_types:
        raise InputError(f"family {name}: config.json says the model is a {kind}")
    return _BY_NAME[name]


def _choose(specs: Specs, kind: str | None) -> tuple[Family | None, tuple[str, ...]]:
    """The family by config.json's `model_type` or by the tensors' names, and notes on it."""
    if kind in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[kind], ()
    if kind is not None:
        return None, (f"model_type {kind!r} is not known",)
    for family in TOLD_BY_NAMES:
        if _has_vocabulary(specs, family) and any(_fits(b, specs) for b in _blocks(specs, family)):
            return family, (_doubt(family),)
    return None, ("the tensors' names fit no family",)


def _doubt(family: Family) -> str:
    """What is said of a family that was told by names alone."""
    alike = [other for other in TOLD_BY_NAMES if other.names == family.names]
    if len(alike) == 1:
        return f"without config.json, taken for {family.name} by its tensors' names"
    *names, last = (other.name for other in sorted(alike, key=lambda other: other.plus_one))
    gain = "1 + weight" if family.plus_one else "weight"
    return (
        f"names fit {', '.join(names)} and {last} alike; without config.json taken for"
        f" {family.name} (a norm's gain is {gain})"
    )


def _has_vocabulary(specs: Specs, family: Family) -> bool:
    return not family.vocabularies or any(
        spec.shape[0] in family.vocabularies
        for name, spec in specs.items()
        if name.endswith(f"{family.names.embedding}.weight") and len(spec.shape) == 2
    )


def _fits(block: _Block, specs: Specs) -> bool:
    """Whether a block has the family's names and shapes, and nothing else."""
    whole = block.tensors.issuperset(block.family.marks) and not block.strangers
    return whole and not any(misfit(pattern, specs) for pattern in block.patterns)


def _blocks(specs: Specs, family: Family) -> list[_Block]:
    """Blocks under every prefix where at least one has all linears of the family."""
    inside = re.compile(rf"(|.*?\.){re.escape(family.names.blocks)}\.(\d+)\.(.+)")
    found: dict[str, dict[int, dict[str, TensorSpec]]] = defaultdict(lambda: defaultdict(dict))
    for name, match in ((name, inside.fullmatch(name)) for name in specs):
        if match:
            found[match[1]][int(match[2])][match[3]] = specs[name]
    blocks = []
    for prefix, numbered in sorted(found.items()):
        own = [
            _Block(family, path, prefix, frozenset(tensors), block_sites(family, tensors))
            for number, tensors in sorted(numbered.items())
            for path in (f"{prefix}{family.names.blocks}.{number}.",)
        ]
        if any(block.whole for block in own):
            blocks += own
    return blocks


def _sites(block: _Block, settings: Config | None, specs: Specs) -> list[Site]:
    heads = _heads(block, settings, specs)
    return [
        make_site(
            replace(pattern, heads=heads),
            specs,
            _obstacle(block, pattern, settings, specs),
            block.experts,
        )
        for pattern in block.patterns
    ]


def _obstacle(
    block: _Block, pattern: FamilySite, settings: Config | None, specs: Specs
) -> str | None:
    """Why nothing takes the factors of a site whose tensors fit."""
    if pattern.reason is not None:
        return pattern.reason
    if strangers := block.strangers:
        name = block.family.name
        return f"{block.path}{strangers[0]} is not known to {name} and may read its inputs"
    condition = pattern.condition
    if condition is None:
        return None
    if settings is not None:
        return None if settings.get(condition.key) == condition.value else condition.reason
    seen = condition.evidence is not None and f"{block.beside}{condition.evidence}" in specs
    if seen or condition.published:
        return None
    return f"without config.json it is not known whether {condition.reason}"


def _heads(block: _Block, settings: Config | None, specs: Specs) -> int:
    """Attention heads, from config.json or from the width of a norm over one head; else 0."""
    given = None if settings is None else settings.get("num_attention_heads")
    if isinstance(given, int):
        return given
    names, transposed = block.family.names, block.family.transposed
    norm = specs.get(f"{block.path}{names.norms.get('q')}.weight")
    output = specs.get(f"{block.path}{names.output}.weight")
    if norm is None or output is None or not norm.shape[-1]:
        return 0
    return output.shape[0 if transposed else -1] // norm.shape[-1]


def _assumed(family: Family) -> tuple[str, ...]:
    """What conditions were taken for granted, once each, without config.json."""
    conditions: list[Condition | None] = [site.condition for kind in kinds(family) for site in kind]
    taken = {c.key: c.value for c in conditions if c is not None and c.published}
    return tuple(f"{key} is taken for {value}: no config.json" for key, value in taken.items())
