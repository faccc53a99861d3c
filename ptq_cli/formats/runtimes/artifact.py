"""What is known of an output from its files, and facts about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptq_cli.core.layer import Layer
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import AS_NAMED, ModuleTree
from ptq_cli.formats import common, fused

FAILS, LIMIT, NOTE = "fails", "limit", "note"
_EXPERT = re.compile(r"^(.*\.experts?)\.\d+\.")


@dataclass(frozen=True)
class Fact:
    """level: "fails" (does not load, or loads and computes noise), "limit" (a kernel's), "note".
    hint: what helps."""

    level: str
    text: str
    modules: tuple[str, ...] = ()
    hint: str | None = None

    @property
    def said(self) -> str:
        """The text and the layers it is about."""
        return f"{fold_names(self.modules)}: {self.text}" if self.modules else self.text

    def __str__(self) -> str:
        return f"{self.said}; {self.hint}" if self.hint else self.said


@dataclass(frozen=True)
class Artifact:
    """What is known of an output from its files.

    dense: linears left in floating point
    files: names in its folder
    fused: experts that runtimes fuse when they load them
    kinds: modules that stay dense unless asked for, and why
    tree: what its modules are in the runtimes
    tied: whether config.json says that the head is the embedding
    repack: formats that could hold these layers, too
    """

    format: str
    layers: Sequence[Layer]
    dense: Sequence[str]
    config: Mapping[str, Any]
    files: Sequence[str]
    fused: Sequence[str] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    tree: ModuleTree = AS_NAMED
    tied: bool = False
    repack: Sequence[str] | None = None

    @property
    def declared(self) -> Mapping[str, Any]:
        return common.mapping(self.config, "quantization_config", "config.json")

    @property
    def heads(self) -> list[str]:
        """Quantized output heads."""
        return [layer.module for layer in self.layers if common.is_head(layer)]

    @property
    def experts(self) -> list[Layer]:
        """Quantized linears of experts that are stored one by one."""
        return [layer for layer in self.layers if _EXPERT.match(layer.module)]

    @property
    def dense_experts(self) -> list[str]:
        return [module for module in self.dense if _EXPERT.match(module)]

    @property
    def dense_linears(self) -> list[str]:
        """Dense modules that are Linears of the runtimes too: no routers."""
        return [module for module in self.dense if self.kinds.get(module) != "router"]

    def mixed_experts(self) -> list[str]:
        """Experts of a mixture whose linears are not all alike, or not all quantized."""
        schemes: dict[str, set[Any]] = {}
        known: dict[str, Any] = {layer.module: fused.scheme(layer) for layer in self.layers}
        for module, scheme in (known | dict.fromkeys(self.dense)).items():
            if found := _EXPERT.match(module):
                schemes.setdefault(found[1], set()).add(scheme)
        return [
            layer.module
            for layer in self.experts
            if (found := _EXPERT.match(layer.module)) and len(schemes[found[1]]) > 1
        ]

    def kind(self, layer: Layer) -> str | None:
        """Why a quantized layer stays dense unless asked for; None where it does not."""
        return "output head" if common.is_head(layer) else self.kinds.get(layer.module)

    def name_in_tree(self, module: str) -> str:
        """What the runtimes call a module of the checkpoint."""
        return self.tree.names(module)[-1]


Facts = Iterator[Fact]


def about(modules: Iterable[str], level: str, text: str, hint: str | None = None) -> Facts:
    """A fact about those modules, if there are any."""
    found = tuple(modules)
    if found:
        yield Fact(level, text, found, hint)


def undivided(layers: Iterable[Layer], then: str = "") -> Facts:
    sized = [layer for layer in layers if layer.grid.group_size > 0]
    short = [layer.module for layer in sized if layer.shape[1] % layer.grid.group_size]
    yield from about(short, FAILS, f"in_features is no multiple of the group size{then}")


def routers(artifact: Artifact) -> Facts:
    """Quantized routers, which transformers, GPTQModel and vLLM have as no Linear."""
    found = [
        layer.module for layer in artifact.layers if artifact.kinds.get(layer.module) == "router"
    ]
    text = "is a router, which runtimes keep in floating point: it would be drawn at random"
    yield from about(found, FAILS, text, "leave it out of --include")


def tied_heads(artifact: Artifact, level: str, then: str) -> Facts:
    if artifact.tied:
        text = f"is quantized, but config.json ties it to the embedding: {then}"
        hint = "tie_word_embeddings: false in config.json"
        yield from about(artifact.heads, level, text, hint)


def asymmetric_experts(artifact: Artifact) -> Facts:
    fused = set(artifact.fused)
    found = [x.module for x in artifact.layers if x.module in fused and not x.grid.sym]
    text = "is an asymmetric expert, which is fused without its zero points: it would be noise"
    yield from about(found, FAILS, text, "--sym")
