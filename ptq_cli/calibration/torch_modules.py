"""Where the linears of a checkpoint are in a torch model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ptq_cli.calibration.torch_experts import is_fused, is_readable
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import ModuleTree
from ptq_cli.models.families import FAMILIES

_IN_EXPERT = re.compile(r"(.*)\.(\d+)\.(\w+)")
_OUTPUTS = {family.names.experts.output for family in FAMILIES if family.names.experts}


@dataclass
class FusedExperts:
    """A module that holds several experts; of each, by number, its linears before and behind the
    activation."""

    module: Any
    before: dict[int, list[str]] = field(default_factory=dict)
    behind: dict[int, list[str]] = field(default_factory=dict)

    def add(self, number: int, linear: str) -> None:
        last = linear.rpartition(".")[2] in _OUTPUTS
        (self.behind if last else self.before).setdefault(number, []).append(linear)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Linears that share their inputs."""
        return [tuple(own) for side in (self.before, self.behind) for own in side.values()]


@dataclass
class Found:
    """modules: by the first name in the checkpoint of those that share one
    names: all of these names, by the first
    experts: by the checkpoint's name of their module
    out_of_reach: linears inside modules that hold several experts in a way that is not known, by
        the class of these
    absent: linears that have no module
    """

    modules: dict[str, Any] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    experts: dict[str, FusedExperts] = field(default_factory=dict)
    out_of_reach: dict[str, list[str]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """What gets no statistics, and what can be done."""
        said = [
            f"{len(linears)} linears of experts are inside {kind}, where no hook reaches them:"
            f" {fold_names(linears)}; for their statistics run ptq calibrate --tokens, or ptq gptq"
            " rounds them to nearest with --fallback rtn"
            for kind, linears in self.out_of_reach.items()
        ]
        if self.absent:
            said.append(
                f"{len(self.absent)} linears of the checkpoint are no modules of the model:"
                f" {fold_names(self.absent)}; named= maps names"
            )
        return said


def find_modules(linears: Iterable[str], modules: Mapping[str, Any], tree: ModuleTree) -> Found:
    """Find the linears of a checkpoint among the modules of a model.

    linears: their names in the checkpoint
    modules: by all their names, the checkpoint's where the caller knows them
    tree: other names that transformers gives them
    """
    found = Found()
    first: dict[int, str] = {}
    for linear in linears:
        module = _find(linear, modules, tree)
        if module is not None:
            name = first.setdefault(id(module), linear)
            found.modules[name] = module
            found.names.setdefault(name, []).append(linear)
            continue
        inside = _IN_EXPERT.fullmatch(linear)
        parent = _find(inside[1], modules, tree) if inside else None
        if inside is None or parent is None or not is_fused(parent):
            found.absent.append(linear)
        elif not is_readable(parent):
            found.out_of_reach.setdefault(type(parent).__name__, []).append(linear)
        else:
            experts = found.experts.setdefault(inside[1], FusedExperts(parent))
            experts.add(int(inside[2]), linear)
            found.names[linear] = [linear]
    return found


def _find(name: str, modules: Mapping[str, Any], tree: ModuleTree) -> Any:
    """The module of a name in the checkpoint, or None."""
    names = tree.names(name)
    # transformers 5 renames what holds the experts of Mixtral, MiniMax and Phi-3.5-MoE
    names += tuple(other.replace(".block_sparse_moe.", ".mlp.") for other in names)
    return next((modules[other] for other in names if other in modules), None)
