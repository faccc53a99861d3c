"""The linears of any model, by names: which are quantized unless one says otherwise, and which
share an input where its sites are not known."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from ptq_cli.core.layer import Skipped
from ptq_cli.core.plugins import ModuleTree
from ptq_cli.core.tensors import TensorSpec, is_float
from ptq_cli.models.families import FAMILIES, family_of, multimodal_of
from ptq_cli.models.family import Config
from ptq_cli.models.gguf_tensors import goes_by_gguf_names, left_alone_in_gguf
from ptq_cli.models.predictors import predictor_tensors
from ptq_cli.models.sites import Site

OTHER_TOWER = "not of the text model"
PREDICTOR = "multi-token prediction"
_LEFT_ALONE = (
    (
        "embedding",  # of tokens, of places, and T5's relative_attention_bias
        re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared|rel\w*_bias)(\.|$)", re.IGNORECASE),
    ),
    ("norm", re.compile(r"(^|\.)(\w*norm\w*|ln_\w+|ln\d*)(\.|$)", re.IGNORECASE)),
    ("output head", re.compile(r"(^|\.)lm_head(\.|$)|^(output|embed_out|score)(\.|$)")),
    ("router", re.compile(r"(^|\.)\w*router\w*(\.|$)")),
    (
        OTHER_TOWER,
        re.compile(
            r"(^|\.)(visual|vit|(vision|image|audio|speech|sound)_\w+|\w*projector\w*"
            r"|connector|resampler|perceiver\w*|abstractor)(\.|$)"
        ),
    ),
)
_ADAPTER = re.compile(
    r"(^|[._])(lora_(A|B|up|down|mid|embedding_A|embedding_B|magnitude_vector)|ia3_l"
    r"|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|oft_[rR]|vera_lambda_[bd]|base_layer)(\.|$)"
)
_EMBEDDING, _HEAD = _LEFT_ALONE[0][1], _LEFT_ALONE[2][1]
_GATE = re.compile(r"^(.*\.|)(\w+_)?gate(\.\w+)?$")

# Own names of linears that share an input, in their order; and the same for each of the names.
_ROWS = [("query", "key", "value"), ("q", "k", "v"), ("wi_0", "wi_1")]  # of no family here
_ROWS += [
    tuple(name.rpartition(".")[2] for name in names)
    for family in FAMILIES
    for names in family.names.sharing
]
_ROW = {name: row for row in _ROWS if len(row) > 1 for name in row}
_ATTENDING = {name for row in _ROW.values() if row[0].startswith("q") for name in row}
# Attention to an encoder's states or another model's: its queries see other inputs than its keys
# and values, and these may differ too, by what is added to one of them for the places.
_CROSS = re.compile(r"cross|^(x|inter|src)_?att|enc(oder)?_?(dec(oder)?_?)?att")


def left_alone(specs: Mapping[str, TensorSpec], config: Config) -> dict[str, str]:
    """Tensors that are left alone unless asked for, and why; all others are quantized.

    What no runtime has as a Linear must stay as it is: routers above all. The family says what
    that is; names say it of families that are not known.
    """
    if goes_by_gguf_names(config):
        kinds = ((name, _by_kind(spec) or left_alone_in_gguf(spec)) for name, spec in specs.items())
        return {name: reason for name, reason in kinds if reason is not None}
    family, multimodal = family_of(config), multimodal_of(config)
    routers = tuple(f".{name}" for name in family.names.routers) if family else ()
    towers = multimodal.towers if multimodal else ()
    names, predictors = sorted(specs), predictor_tensors(specs, config)
    reasons = {}
    for name, spec in specs.items():
        module = name.removesuffix(".weight")
        reason = _by_kind(spec)
        if reason is None and module.endswith(routers):
            reason = "router"
        if reason is None and any(tower in module.split(".") for tower in towers):
            reason = OTHER_TOWER
        if reason is None and family is None and _is_router(module, names):
            reason = "router"
        if reason is None and not predictors.get(name, True):
            reason = PREDICTOR
        if reason is not None:
            reasons[name] = reason
    return reasons


def adapter_tensors(specs: Iterable[str]) -> list[str]:
    """Tensors of an adapter (LoRA and its kin), which change what the linears beside them compute,
    or another model's altogether."""
    return [name for name in specs if _ADAPTER.search(name)]


def _by_kind(spec: TensorSpec) -> str | None:
    """Why a tensor is left alone by its kind and its name."""
    if not is_float(spec):
        return f"dtype {spec.dtype}"
    if prod(spec.shape) == 0:
        return "empty"
    if len(spec.shape) != 2:
        return f"rank {len(spec.shape)}"
    for kind, pattern in _LEFT_ALONE:
        if pattern.search(spec.name.removesuffix(".weight")):
            return kind
    return None if spec.name.endswith(".weight") else "not a .weight"


def _is_router(module: str, names: Sequence[str]) -> bool:
    """Whether it weighs whole branches: a gate, or a linear of whatever name right beside experts;
    no up or down stands beside it. names: of all tensors, sorted"""
    gate, parent = _GATE.match(module), module.rpartition(".")[0]
    beside = f"{parent}." if gate is None else gate[1]
    if gate is None and not _any_begins(names, f"{parent}.experts."):
        return False
    return not any(_any_begins(names, f"{beside}{part}") for part in ("up", "down"))


def _any_begins(names: Sequence[str], prefix: str) -> bool:
    """Whether one of the sorted names begins so."""
    place = bisect_left(names, prefix)
    return place < len(names) and names[place].startswith(prefix)


def module_tree(config: Config) -> ModuleTree:
    """What the modules are called in the runtimes, and whether they are Linears there."""
    family, multimodal = family_of(config), multimodal_of(config)
    renames = () if multimodal is None else multimodal.renames
    return ModuleTree(renames, family is not None and family.own_class)


def dense_modules(skipped: Sequence[Skipped]) -> list[str]:
    """Linears that are left in floating point, 8 bits of it included: runtimes want them declared.

    An embedding is none, but a projection inside a module of embeddings is.
    """
    return [
        module
        for entry in skipped
        for module in (entry.tensor.removesuffix(".weight"),)
        if entry.tensor.endswith(".weight")
        and len(entry.shape) == 2
        and entry.dtype.startswith(("F", "BF"))
        and (_HEAD.search(module) or not _EMBEDDING.search(module.rpartition(".")[2]))
    ]


def is_cross_attention(module: str) -> bool:
    """Whether its name says that it makes queries, keys or values of an attention to another
    sequence: what tells is the last of its parents that says what kind of attention it is."""
    *parents, own = module.lower().split(".")
    plain = ("attn", "attention", "att")
    kinds = [part for part in parents if "att" in part and part not in plain]
    return own in _ATTENDING and bool(kinds) and _CROSS.search(kinds[-1]) is not None


def known_row(module: str) -> tuple[str, ...]:
    """What siblings of a known family that share their input are called, of which one is called as
    this module; else its own name alone."""
    own = module.rpartition(".")[2]
    return _ROW.get(own, (own,))


def group_modules(modules: Iterable[str], sites: Sequence[Site] = ()) -> list[tuple[str, ...]]:
    """Group modules that share an input; groups keep the order in which their first member came,
    members the order of their site. (In a cross attention, q has other inputs than k and v.)

    sites: the model's, as far as they are known; modules in none of them go by their names
    """
    places: dict[str, tuple[object, int]] = {
        linear.module: ((site.name, linear.expert), place)
        for site in sites
        for place, linear in enumerate(site.linears)
    }
    groups: dict[object, list[tuple[int, str]]] = {}
    for module in modules:
        parent, _, own = module.rpartition(".")
        row = known_row(module)
        key, place = places.get(module, ((parent, row), row.index(own)))
        groups.setdefault(key, []).append((place, module))
    return [tuple(module for _, module in sorted(group)) for group in groups.values()]
