"""What a layer may get where a budget decides: choices, the groups that take one together, and the
recipe that a decision becomes.

A choice is a width (`W3A16`: 3 bits, all else as the settings say), a scheme of small floats, or
one of ggml's types. What a runtime makes one matrix of takes one choice: q, k and v; gate and up;
all experts of a block. In GGUF each tensor is its own, of all experts too.

Every choice is planned for the whole model, its rule before those of the recipe: what the recipe or
`--keep` says of single layers stands in all of these plans, and leaves nothing to decide there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ptq_cli.core.layer import Layer, Plan
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Format
from ptq_cli.errors import InputError
from ptq_cli.formats.fused import fused_groups, scheme
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.mixes import MIXES
from ptq_cli.plan.name_patterns import matches
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.storage.checkpoint import Checkpoint

_WIDTH = re.compile(r"W([2-8])A16", re.IGNORECASE)
_EXPERTS = re.compile(r"^(.*\bexperts)\.\d+\.")
# A mix for each type that is the main one of some: by it the file is called.
_MIX_OF = {mix.main: name for name, mix in reversed(MIXES.items())}
USUAL = ("W2A16", "W3A16", "W4A16", "W5A16", "W6A16")
USUAL_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Choice:
    """What a layer may get. rule: as a recipe's [[layers]] says it"""

    name: str
    rule: Mapping[str, Any]

    def settings(self, base: GridSettings) -> GridSettings:
        """Settings under which every layer gets it that no rule speaks of."""
        if "type" in self.rule:
            mix = _MIX_OF[self.rule["type"]]
            return replace(base, scheme=mix, pure=True)
        return replace(base, layers=({"match": "", **self.rule}, *base.layers))


@dataclass(frozen=True)
class Group:
    """Layers that take one choice together.

    layers: by choice; a choice that is not there is none for this group
    sizes: bytes of what they become, by choice
    """

    name: str
    layers: Mapping[str, tuple[Layer, ...]]
    sizes: Mapping[str, int]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return tuple(layer.module for layer in next(iter(self.layers.values())))

    @cached_property
    def weights(self) -> int:
        return sum(layer.size for layer in next(iter(self.layers.values())))

    @cached_property
    def decided(self) -> bool:
        """Whether it comes out the same whatever the choice."""
        found = list(self.layers.values())
        return all(layers == found[0] for layers in found)


def read_choices(words: Sequence[str], fmt: Format) -> tuple[Choice, ...]:
    """Choices by their words; the usual ones where none are given.

    Raises:
        InputError: a word that is none, fewer than two, or GGUF's types beside others.
    """
    usual = USUAL_TYPES if fmt.container == "gguf" else USUAL
    found = {choice.name: choice for choice in map(read_choice, words or usual)}
    if len(found) < 2:
        raise InputError(
            f"--choices {','.join(found)}: one leaves nothing to choose",
            hint=f"name several, as {','.join(usual)}",
        )
    _check_one_kind(found.values(), f"--choices {','.join(found)}")
    return tuple(found.values())


def _check_one_kind(choices: Iterable[Choice], said: str) -> None:
    types = ["type" in choice.rule for choice in choices]
    if any(types) and not all(types):
        raise InputError(f"{said}: GGUF's types and others do not go into one file")


def read_choice(word: str) -> Choice:
    """Raises InputError for what is no choice."""
    name = word.strip().upper()
    if width := _WIDTH.fullmatch(name):
        return Choice(name, {"bits": int(width[1])})
    if name in SCHEMES and SCHEMES[name].fixed:
        return Choice(name, {"scheme": name})
    if name in _MIX_OF and name in TYPES:
        return Choice(name, {"type": name})
    fixed = [scheme for scheme, own in SCHEMES.items() if own.fixed]
    known = ", ".join(dict.fromkeys(["W2A16 … W8A16", *fixed, *_MIX_OF]))
    raise InputError(f"no choice {word!r}", hint=f"choose of {known}")


def kept_rules(words: Iterable[str], choices: Iterable[Choice]) -> tuple[dict[str, Any], ...]:
    """--keep REGEX=CHOICE as rules, beside these choices. Raises InputError."""
    rules = []
    for text in words:
        word, _, name = text.rpartition("=")
        if not word:
            raise InputError(f"--keep {text!r}: not REGEX=CHOICE", hint="--keep lm_head=W6A16")
        kept = read_choice(name)
        _check_one_kind([*choices, kept], f"--keep {text}")
        rules.append({"match": word, **kept.rule})
    return tuple(rules)


def check_kept(
    words: Iterable[str],
    plans: Iterable[Plan],
    checkpoint: Checkpoint,
    gguf_names: Mapping[str, str],
) -> None:
    """Raises InputError where --keep names nothing that any plan quantizes."""
    names = {layer.tensor for plan in plans for layer in plan.layers}
    for text in words:
        pattern = re.compile(text.rpartition("=")[0])
        if not any(matches(pattern, checkpoint.tensors[name], gguf_names) for name in names):
            hint = "--include REGEX has it quantized, too"
            raise InputError(f"--keep {text}: all that it names stays as it is", hint=hint)


def make_groups(
    plans: Mapping[str, Plan], fmt: Format, gguf_names: Mapping[str, str]
) -> tuple[Group, ...]:
    """The groups of a model, in the order of its layers.

    plans: by choice; gguf_names: of tensors, where the output is GGUF, else none

    Raises:
        InputError: layers of a group are pinned to different choices.
    """
    layers = {name: {layer.module: layer for layer in plan.layers} for name, plan in plans.items()}
    every = {layer.module: layer for plan in plans.values() for layer in plan.layers}
    groups = []
    for name, modules in _together(every.values(), gguf_names).items():
        own = {
            choice: tuple(found[module] for module in modules)
            for choice, found in layers.items()
            if found.keys() >= set(modules)
        }
        if not own:
            raise InputError(f"{name}: no choice holds all of it: {fold_names(modules)}")
        if not gguf_names:
            _check_alike(own)
        sizes = {
            choice: sum(spec.nbytes for layer in found for spec in fmt.specs(layer))
            for choice, found in own.items()
        }
        groups.append(Group(name, own, sizes))
    return tuple(groups)


def _together(layers: Iterable[Layer], gguf_names: Mapping[str, str]) -> dict[str, list[str]]:
    """Modules by the group that they are in."""
    found: dict[str, list[str]] = {}
    if gguf_names:
        for layer in layers:
            found.setdefault(gguf_names[layer.tensor], []).append(layer.module)
        return found
    modules = [layer.module for layer in layers]
    for fused in fused_groups(modules):
        experts = _EXPERTS.match(fused[0])
        found.setdefault(experts[1] if experts else fused[0], []).extend(fused)
    return found


def _check_alike(layers: Mapping[str, Sequence[Layer]]) -> None:
    """Refuse a group of which only a part is pinned, or parts differently."""
    for own in layers.values():
        other = next((layer for layer in own if scheme(layer) != scheme(own[0])), None)
        if other is not None:
            raise InputError(
                f"{own[0].module} and {other.module} are one matrix in runtimes (vLLM), and would"
                " get different numbers",
                hint="let --keep and [[layers]] name both, or neither",
            )


def recipe_rules(
    groups: Sequence[Group], picks: Sequence[str], choices: Mapping[str, Choice], fmt: Format
) -> tuple[dict[str, Any], ...]:
    """[[layers]] that give each group its pick; blocks that get the same stand in one rule. What is
    decided anyway needs none, but for GGUF's types: a mix has others for some tensors."""
    numbers: dict[tuple[str, tuple[tuple[str, Any], ...]], list[str]] = {}
    for group, pick in zip(groups, picks, strict=True):
        if group.decided and "type" not in choices[pick].rule:
            continue
        for layer in group.layers[pick]:
            said = dict(choices[pick].rule)
            if "type" in said:  # what the width makes of it
                said["type"] = str(fmt.type_of(layer))
            template, number = _template(layer.tensor)
            own = numbers.setdefault((template, tuple(said.items())), [])
            if number not in own:
                own.append(number)
    rules = []
    for (template, rule), own in numbers.items():
        which = own[0] if len(own) == 1 else f"({'|'.join(own)})"
        rules.append({"match": f"^{template.replace(_HOLE, which)}$", **dict(rule)})
    return tuple(rules)


_HOLE = "\0"


def _template(tensor: str) -> tuple[str, str]:
    """A tensor's name as a regular expression with a hole for the first number in it, and that
    number; experts, which are alike, are all of them."""
    parts = tensor.split(".")
    places = [i for i, part in enumerate(parts) if part.isdecimal()]
    number = parts[places[0]] if places else ""
    words = [re.escape(part) for part in parts]
    for i in places[:1]:
        words[i] = _HOLE
    for i in places[1:]:
        if parts[i - 1].endswith("experts"):
            words[i] = r"\d+"
    return r"\.".join(words), number


def base_scheme(
    groups: Sequence[Group], picks: Sequence[str], choices: Mapping[str, Choice]
) -> str | None:
    """The mix that the recipe names where ggml's types were chosen: that of most weights."""
    counts: dict[str, int] = {}
    for group, pick in zip(groups, picks, strict=True):
        counts[pick] = counts.get(pick, 0) + group.weights
    kind = choices[max(counts, key=lambda pick: counts[pick])].rule.get("type")
    return None if kind is None else _MIX_OF[kind]
