"""What GGUF files call the tensors of the families that they hold: names follow from roles."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.family import Family

_NORMS = {"attention_in": "attn_norm", "mlp_in": "ffn_norm", "q": "attn_q_norm", "k": "attn_k_norm"}


@dataclass(frozen=True)
class GgufNames:
    """The names of one family.

    architecture: GGUF's word for the family; model_type: config.json's
    modules: module → name in GGUF, with "{}" for the number of a block
    permuted: modules inside a block whose rows GGUF orders otherwise in each head → config.json's
        key for the number of heads
    biases: modules inside a block → config.json's key for whether they have biases, or whether
        they always have
    """

    architecture: str
    model_type: str
    modules: Mapping[str, str]
    permuted: Mapping[str, str]
    biases: Mapping[str, bool | str]

    def tensor_name(self, name: str) -> str:
        """The name in GGUF of a tensor in a checkpoint. Raises InputError where it has none."""
        return self._translated(name, self.modules, "has no name")

    def module_of(self, name: str) -> str:
        """The module of a tensor in GGUF. Raises InputError for a name that is not known."""
        modules = {own: module for module, own in self.modules.items()}
        return self._translated(name, modules, "is not understood").rpartition(".")[0]

    def _translated(self, name: str, modules: Mapping[str, str], problem: str) -> str:
        module, _, ending = name.rpartition(".")
        block = re.search(r"\.(\d+)\.", module)
        found = modules.get(module.replace(block[0], ".{}.", 1) if block else module)
        if found is None or ending not in ("weight", "bias"):
            where = f"gguf's architecture {self.architecture}"
            raise InputError(f"tensor {name!r} {problem} in {where}")
        return f"{found.format(block[1] if block else '')}.{ending}"

    def told_by_tensors(self, names: Collection[str], n_blocks: int) -> dict[str, bool]:
        """What config.json says of biases and of a tied head, by a checkpoint's names. Raises
        InputError where a weight is missing, or biases are that the family does not have."""
        wanted = {
            module.format(i): own for module, own in self.modules.items() for i in range(n_blocks)
        }
        head = next(module for module, own in self.modules.items() if own == "output")
        missing = [m for m in wanted if m != head and f"{m}.weight" not in names]
        if missing:
            name = self.tensor_name(f"{missing[0]}.weight")
            raise InputError(f"tensor {name!r} is missing; {len(missing)} of {len(wanted)} are")
        settings: dict[str, bool] = {"tie_word_embeddings": f"{head}.weight" not in names}
        for module, key in self.biases.items():
            found = any(name.endswith(f".{module}.bias") for name in names)
            stated = settings.setdefault(key, found) if isinstance(key, str) else key
            if found != stated:
                what = "has a bias" if found else "lacks its bias"
                raise InputError(f"{module} {what}, which a {self.model_type} cannot")
        return settings

    def permuted_heads(self, module: str, config: Mapping[str, Any]) -> int | None:
        """Heads within which GGUF orders the rows of this module otherwise, weights and biases; or
        None."""
        for name, key in self.permuted.items():
            if module.endswith(f".{name}"):
                return int(config.get(key) or config["num_attention_heads"])
        return None


def names_of_model(config: Mapping[str, Any]) -> GgufNames:
    """The names for a config.json. Raises InputError for a model that GGUF does not hold here."""
    kind = str(config.get("model_type"))
    known = {kind: family for family in FAMILIES if family.gguf for kind in family.model_types}
    if kind not in known:
        message = f"gguf: model_type {kind!r} is not known, only {', '.join(sorted(known))}"
        raise InputError(message, hint="--format ptq, which holds every model")
    return _names(known[kind])


def names_of_file(architecture: str) -> GgufNames:
    """The names in a file, by its `general.architecture`. Raises InputError for another one."""
    for family in FAMILIES:
        if family.gguf == architecture:
            return _names(family)
    known = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES if family.gguf))
    message = f"gguf: general.architecture {architecture!r} is not understood"
    hint = f"known are {known}; every other one becomes GGUF again: --format gguf, no --tokens"
    raise InputError(message, hint=hint)


def _names(family: Family) -> GgufNames:
    names = family.names
    prefix = names.prefixes[0]
    inside = {names.output: "attn_output", names.mlp_out: "ffn_down"}
    inside |= zip(names.qkv, ("attn_q", "attn_k", "attn_v"), strict=True)
    inside |= zip(names.mlp_in, ("ffn_gate", "ffn_up"), strict=True)
    inside |= {names.norms[role]: own for role, own in _NORMS.items() if role in names.norms}
    modules = {
        f"{prefix}{names.blocks}.{{}}.{name}": f"blk.{{}}.{own}" for name, own in inside.items()
    }
    modules |= {f"{prefix}{names.embedding}": "token_embd", names.head: "output"}
    modules[f"{prefix}{names.final_norm}"] = "output_norm"
    keys = ("num_attention_heads", "num_key_value_heads") if family.gguf_permuted else ()
    permuted = dict(zip(names.qkv, keys, strict=False))
    own = {} if family.forward is None else family.forward.biases
    parts = {"qkv": names.qkv[0], "output": names.output, "mlp": names.mlp_out}
    biases = {module: own.get(part, False) for part, module in parts.items()}
    return GgufNames(str(family.gguf), family.name, modules, permuted, biases)
