"""The blocks of a model whose family nobody knows: what one number in the names counts.

A block's width is config.json's `hidden_size` (or what else it is called) where linears take it,
else what most of them take.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.family import Config, text_config
from ptq_cli.models.linears import left_alone
from ptq_cli.models.sites import Specs


def keys_for(word: str, *others: str) -> tuple[str, ...]:
    """What config.json may call a setting: as the families do, then as others do."""
    named = (family.keys[word] for family in FAMILIES if word in family.keys)
    return tuple(dict.fromkeys((word, *named, *others)))


_WIDTHS = keys_for("hidden_size", "d_model", "embed_dim", "model_dim", "dim")
_HEADS = keys_for("num_attention_heads", "n_heads", "num_heads")
_KEY_HEADS = keys_for("num_key_value_heads", "n_head_kv", "n_kv_heads", "num_kv_heads")
_INSIDE = re.compile(r"((?:.*?\.)?)([0-9]{1,9})\.(.+)", re.DOTALL)


@dataclass(frozen=True)
class Heads:
    """Attention heads, key heads and channels of a head; 0: config.json does not say."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True)
class UnknownBlock:
    """By the names inside it; linears are those that are quantized unless one says otherwise.

    path: with its dot, "model.layers.3."
    linears: (out_features, in_features)
    norms: sizes of the norms right in it
    readers: other tensors that take its width, such as routers and experts in one tensor
    parameters: tensors of its width that are no weight or bias
    transposed: linears are stored [in_features, out_features], as the sizes of biases say
    """

    path: str
    width: int
    linears: Mapping[str, tuple[int, int]]
    norms: Mapping[str, int]
    readers: tuple[str, ...]
    parameters: tuple[str, ...]
    transposed: bool

    @property
    def kind(self) -> object:
        """Equal for blocks of one row that have the same linears, of the same shapes, and norms."""
        linears, norms = tuple(self.linears.items()), tuple(self.norms.items())
        row = self.path.rsplit(".", 2)[0]
        return row, self.width, linears, norms, self.readers, self.parameters, self.transposed


def read_heads(config: Config) -> Heads:
    """The heads that config.json tells of."""
    settings = text_config(config)
    queries = _number(settings, _HEADS)
    hidden = _number(settings, _WIDTHS)
    width = _number(settings, ("head_dim",)) or (hidden // queries if queries else 0)
    return Heads(queries, _number(settings, _KEY_HEADS) or queries, width)


def read_blocks(specs: Specs, config: Config) -> list[UnknownBlock]:
    """All blocks that have linears, in the order of their names and numbers."""
    reasons = left_alone(specs, config)
    stacks: dict[str, dict[int, dict[str, TensorSpec]]] = defaultdict(lambda: defaultdict(dict))
    for name, match in ((name, _INSIDE.fullmatch(name)) for name in specs):
        if match:
            stacks[match[1]][int(match[2])][match[3]] = specs[name]
    blocks = []
    for prefix, numbered in sorted(stacks.items()):
        own = {number: _linears(numbered[number], reasons) for number in sorted(numbered)}
        turned = {number: _transposed(own[number], numbered[number]) for number in own}
        inputs = (
            shape[0 if turned[number] else 1] for number in own for shape in own[number].values()
        )
        width = _width(inputs, config)
        blocks += [
            _block(f"{prefix}{number}.", numbered[number], own[number], width, turned[number])
            for number in own
            if own[number]
        ]
    return blocks


def _linears(tensors: Specs, reasons: Collection[str]) -> dict[str, tuple[int, int]]:
    """Shapes as they are stored, by module."""
    return {
        name.removesuffix(".weight"): (spec.shape[0], spec.shape[1])
        for name, spec in tensors.items()
        if spec.name not in reasons
    }


def _transposed(linears: Mapping[str, tuple[int, int]], tensors: Specs) -> bool:
    """Whether there are biases that have a size for each column, and none for each row."""
    told = [
        bias.shape == (shape[1],)
        for module, shape in linears.items()
        for bias in (tensors.get(f"{module}.bias"),)
        if bias is not None and shape[0] != shape[1]
    ]
    return bool(told) and all(told)


def _width(inputs: Iterable[int], config: Config) -> int:
    counted = Counter(inputs)
    stated = _number(text_config(config), _WIDTHS)
    if stated in counted or not counted:
        return stated
    return counted.most_common(1)[0][0]


def _number(settings: Config, keys: Iterable[str]) -> int:
    values = (settings.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def _block(
    path: str,
    tensors: Specs,
    stored: Mapping[str, tuple[int, int]],
    width: int,
    transposed: bool,
) -> UnknownBlock:
    linears = {m: (b, a) if transposed else (a, b) for m, (a, b) in stored.items()}
    norms: dict[str, int] = {}
    readers: list[str] = []
    parameters: list[str] = []
    for name, spec in tensors.items():
        module, _, own = name.rpartition(".")
        if module in linears or not spec.shape:
            continue
        if own not in ("weight", "bias") and prod(spec.shape) == spec.shape[-1] == width:
            parameters.append(name)
        elif own == "weight" and len(spec.shape) == 1 and "." not in module:
            norms[module] = spec.shape[0]
        elif len(spec.shape) in (2, 3) and width in spec.shape[1:]:
            readers.append(name)
    return UnknownBlock(path, width, linears, norms, tuple(readers), tuple(parameters), transposed)
