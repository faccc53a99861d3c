"""The sites of a checkpoint, from its config.json and the names and shapes in its headers.

config.json's `model_type` decides the family; without one the names do, and what they cannot tell
is said in the notes. A block that holds a tensor its family does not know is left alone: that
tensor may read the same norm (a router, an adapter), and a fold would change it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.core.text import nearest_or_all
from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.family import Condition, Config, Family, SitePattern
from ptq_cli.models.sites import Norm, Preceding, Site, SiteLinear, rows_of

Specs = Mapping[str, TensorSpec]

_KNOWN = [family for family in FAMILIES if family.folds is not None]
_BY_NAME = {family.name: family for family in _KNOWN}
_BY_MODEL_TYPE = {kind: family for family in _KNOWN for kind in family.model_types}
_LISTS = "|".join(sorted({re.escape(family.names.blocks) for family in _KNOWN}))
_BLOCK = re.compile(rf"^(|.*?\.)({_LISTS})\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Sites:
    """family: None where none fits; notes: what was assumed, or why there are no sites."""

    family: str | None
    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Block:
    """A decoder block: `path` with its dot ("model.layers.3."), its tensors by their inner names,
    and `beside`, the prefix of what stands beside the blocks ("model.")."""

    path: str
    beside: str
    tensors: Mapping[str, TensorSpec]

    def shape(self, inner: str) -> tuple[int, ...]:
        return self.tensors[inner].shape


def find_sites(specs: Specs, config: Config | None = None, family: str | None = None) -> Sites:
    """The sites of all blocks, in the order of the blocks.

    specs: the headers of the whole checkpoint
    config: config.json; a multimodal model's `text_config` is looked into
    family: a family's name, which then goes before config.json and names

    Raises:
        InputError: `family` is none of the table's, or no block of the checkpoint is of it.
    """
    settings = _text_config(config)
    row, notes = _choose(specs, settings, family)
    if row is None:
        return Sites(None, (), notes)
    blocks = _blocks(specs, row)
    if not blocks:
        message = f"no block of the checkpoint has the linears of a {row.name} model"
        if family is not None:
            raise InputError(message)
        return Sites(None, (), (*notes, message))
    if family is not None:
        _check_family(row, blocks, settings)
    sites = tuple(_site(block, row, p, settings, specs) for block in blocks for p in row.sites)
    return Sites(row.name, sites, (*notes, *_assumed(row, settings)))


def _check_family(row: Family, blocks: list[_Block], config: Config | None) -> None:
    """Refuse a family that the model is not of, by its config.json or its tensors."""
    kind = None if config is None else config.get("model_type")
    if kind in _BY_MODEL_TYPE and kind not in row.model_types:
        raise InputError(f"family {row.name}: config.json says the model is a {kind}")
    for mark in row.marks:
        if not any(mark in block.tensors for block in blocks):
            raise InputError(f"family {row.name}: no block of the checkpoint has a {mark}")


def _text_config(config: Config | None) -> Config | None:
    if config is None:
        return None
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def _choose(
    specs: Specs, config: Config | None, name: str | None
) -> tuple[Family | None, tuple[str, ...]]:
    if name is not None:
        if name not in _BY_NAME:
            hint = nearest_or_all(name, sorted(_BY_NAME))
            raise InputError(f"family {name!r} is not known", hint=hint)
        return _BY_NAME[name], ()
    if config is not None and "model_type" in config:
        kind = config["model_type"]
        if kind in _BY_MODEL_TYPE:
            return _BY_MODEL_TYPE[kind], ()
        known = any(kind in family.model_types for family in FAMILIES)
        what = f"the sites of model_type {kind!r} are" if known else f"model_type {kind!r} is"
        return None, (f"{what} not known; [[sites]] in a recipe name its sites",)
    for family in _KNOWN:
        if _named(specs, family):
            return family, _doubt(family)
    return None, ("the tensors' names fit no family; [[sites]] in a recipe name the sites",)


def _doubt(family: Family) -> tuple[str, ...]:
    """What is said of a family that was told by names alone."""
    alike = [other for other in _KNOWN if _looks(other) == _looks(family)]
    if len(alike) == 1:
        return (f"without config.json, taken for {family.name} by its tensors' names",)
    *names, last = (other.name for other in sorted(alike, key=lambda other: other.plus_one))
    gain = "1 + weight" if family.plus_one else "weight"
    return (
        f"names fit {', '.join(names)} and {last} alike; without config.json taken for"
        f" {family.name} (a norm's gain is {gain})",
    )


def _looks(family: Family) -> object:
    """What names alone tell of a family."""
    return family.names.blocks, family.marks, [(p.linears, p.norm) for p in family.sites]


def _named(specs: Specs, family: Family) -> bool:
    """Whether some block fits the family's names and shapes, and nothing speaks against it."""
    blocks = _blocks(specs, family)
    if family.vocabularies is not None and not _has_vocabulary(specs, family):
        return False
    return any(_fits(block, family) for block in blocks)


def _has_vocabulary(specs: Specs, family: Family) -> bool:
    return any(
        spec.shape[0] in (family.vocabularies or ())
        for name, spec in specs.items()
        if name.endswith(f"{family.names.embedding}.weight") and len(spec.shape) == 2
    )


def _fits(block: _Block, family: Family) -> bool:
    norms = [f"{p.norm}.weight" for p in family.sites if p.norm]
    linears = [f"{linear}.weight" for p in family.sites for linear in p.linears]
    if not all(name in block.tensors for name in (*linears, *norms, *family.marks)):
        return False
    if _strangers(block, family):
        return False
    for pattern in family.sites:
        widths = {_in_features(block, linear, family) for linear in pattern.linears}
        if pattern.norm:
            widths.add(block.shape(f"{pattern.norm}.weight")[0])
        if len(widths) != 1:
            return False
    return True


def _blocks(specs: Specs, family: Family) -> list[_Block]:
    """Blocks under every prefix where at least one has all linears of the family."""
    found: dict[str, dict[int, dict[str, TensorSpec]]] = defaultdict(lambda: defaultdict(dict))
    for name, spec in specs.items():
        match = _BLOCK.match(name)
        if match and match[2] == family.names.blocks:
            found[match[1]][int(match[3])][match[4]] = spec
    linears = [f"{linear}.weight" for p in family.sites for linear in p.linears]
    blocks = []
    for prefix, numbered in sorted(found.items()):
        if any(all(_is_matrix(t, name) for name in linears) for t in numbered.values()):
            for number, tensors in sorted(numbered.items()):
                path = f"{prefix}{family.names.blocks}.{number}."
                blocks.append(_Block(path, prefix, tensors))
    return blocks


def _is_matrix(tensors: Mapping[str, TensorSpec], name: str) -> bool:
    return name in tensors and len(tensors[name].shape) == 2


def _strangers(block: _Block, family: Family) -> list[str]:
    """Tensors of the block that the family does not know."""
    modules = [name for p in family.sites for name in (*p.linears, p.norm) if name]
    known = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    return sorted(set(block.tensors) - known - {*family.names.other_norms, *family.names.buffers})


def _in_features(block: _Block, linear: str, family: Family) -> int:
    shape = block.shape(f"{linear}.weight")
    return shape[0] if family.transposed else shape[-1]


def _site(
    block: _Block, family: Family, pattern: SitePattern, config: Config | None, specs: Specs
) -> Site:
    needed = [f"{linear}.weight" for linear in pattern.linears]
    needed += [f"{source}.weight" for source in (pattern.norm, pattern.after) if source]
    missing = tuple(f"{block.path}{name}" for name in needed if name not in block.tensors)
    present = [x for x in pattern.linears if f"{x}.weight" in block.tensors]
    linears = tuple(
        SiteLinear(f"{block.path}{x}", f"{block.path}{x}.weight", family.transposed)
        for x in pattern.linears
    )
    width = _in_features(block, present[0], family) if present else 0
    feeder: Norm | Preceding | str
    if missing:
        feeder = f"{', '.join(missing)} not in the checkpoint"
    else:
        feeder = _feeder(block, family, pattern, config, specs, width)
    if isinstance(feeder, str):
        return Site(linears[0].module, linears, width, None, feeder, missing)
    return Site(linears[0].module, linears, width, feeder)


def _feeder(
    block: _Block,
    family: Family,
    pattern: SitePattern,
    config: Config | None,
    specs: Specs,
    width: int,
) -> Norm | Preceding | str:
    """What takes the factors, or why nothing does."""
    if pattern.reason is not None:
        return pattern.reason
    strangers = _strangers(block, family)
    if strangers:
        return f"{block.path}{strangers[0]} is not known to {family.name} and may read its inputs"
    for linear in pattern.linears:
        if _in_features(block, linear, family) != width:
            return f"{linear} takes {_in_features(block, linear, family)} inputs, not {width}"
    condition = pattern.condition
    if condition is not None and not _holds(condition, config, block, specs):
        unknown = "" if config is not None else "without config.json it is not known whether "
        return unknown + condition.reason
    source = pattern.norm or pattern.after
    bias = f"{block.path}{source}.bias" if f"{source}.bias" in block.tensors else None
    if pattern.norm:
        channels = block.shape(f"{source}.weight")
        if channels != (width,):
            return f"{block.path}{source} has {channels} gains for {width} inputs"
        return Norm(f"{block.path}{source}.weight", bias, family.plus_one)
    shape = block.shape(f"{source}.weight")
    outputs = shape[1] if family.transposed else shape[0]
    rows = rows_of(pattern.layout, outputs, width, _heads(config, block, family, width))
    if isinstance(rows, str):
        return rows
    return Preceding(f"{block.path}{source}.weight", bias, rows, family.transposed)


def _holds(condition: Condition, config: Config | None, block: _Block, specs: Specs) -> bool:
    if config is not None:
        return bool(config.get(condition.key, condition.default) == condition.value)
    if condition.evidence is not None:
        return f"{block.beside}{condition.evidence}" in specs
    return condition.published


def _heads(config: Config | None, block: _Block, family: Family, width: int) -> int | None:
    """Attention heads, from config.json or from the width of a norm over one head."""
    for key in ("num_attention_heads", family.folds.heads if family.folds else ""):
        if config is not None and isinstance(config.get(key), int):
            return int(config[key])
    norm = block.tensors.get(f"{family.names.norms.get('q')}.weight")
    return width // norm.shape[0] if norm is not None and norm.shape[0] else None


def _assumed(family: Family, config: Config | None) -> tuple[str, ...]:
    """What conditions were taken for granted, once each."""
    if config is not None:
        return ()
    conditions = (pattern.condition for pattern in family.sites)
    taken = {c.key: c.value for c in conditions if c is not None and c.published}
    return tuple(f"{key} is taken for {value}: no config.json" for key, value in taken.items())
