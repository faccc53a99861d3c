"""What GGUF files call the tensors of the families that they hold: names follow from roles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.family import Family

_NORMS = {"attention_in": "attn_norm", "mlp_in": "ffn_norm", "q": "attn_q_norm", "k": "attn_k_norm"}


@dataclass(frozen=True)
class GgufNames:
    """The names of one family.

    architecture: GGUF's word for the family; path: of its blocks in a checkpoint
    beside, inside: module → name in GGUF, of what stands beside the blocks and inside one
    permuted: modules inside a block whose rows GGUF orders otherwise in each head → config.json's
        key for the number of heads
    """

    architecture: str
    path: str
    beside: Mapping[str, str]
    inside: Mapping[str, str]
    permuted: Mapping[str, str]

    def tensor_name(self, name: str) -> str:
        """The name in GGUF of a tensor in a checkpoint. Raises InputError where it has none."""
        module, _, ending = name.rpartition(".")
        block = re.fullmatch(rf"{re.escape(self.path)}(\d+)\.(.+)", module)
        own = self.inside.get(block[2]) if block else self.beside.get(module)
        if own is None or ending not in ("weight", "bias"):
            where = f"gguf's architecture {self.architecture}"
            raise InputError(f"tensor {name!r} has no name in {where}")
        return f"blk.{block[1]}.{own}.{ending}" if block else f"{own}.{ending}"

    def module_of(self, name: str) -> str:
        """The module of a tensor in GGUF. Raises InputError for a name that is not known."""
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(?:weight|bias)", name)
        if found is not None:
            for module, own in (self.inside if found[1] else self.beside).items():
                if own == found[2]:
                    return f"{self.path}{found[1]}.{module}" if found[1] else module
        where = f"gguf's architecture {self.architecture}"
        raise InputError(f"tensor {name!r} is not understood in {where}")

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
        raise InputError(message, hint="another --format")
    return _names(known[kind])


def names_of_file(architecture: str) -> GgufNames:
    """The names in a file, by its `general.architecture`. Raises InputError for another one."""
    for family in FAMILIES:
        if family.gguf == architecture:
            return _names(family)
    raise InputError(f"gguf: general.architecture {architecture!r} is not understood")


def _names(family: Family) -> GgufNames:
    names = family.names
    prefix = names.prefixes[0]
    beside = {
        f"{prefix}{names.embedding}": "token_embd",
        f"{prefix}{names.final_norm}": "output_norm",
        names.head: "output",
    }
    inside = {names.output: "attn_output", names.mlp_out: "ffn_down"}
    inside |= zip(names.qkv, ("attn_q", "attn_k", "attn_v"), strict=True)
    inside |= zip(names.mlp_in, ("ffn_gate", "ffn_up"), strict=True)
    inside |= {names.norms[role]: own for role, own in _NORMS.items() if role in names.norms}
    keys = ("num_attention_heads", "num_key_value_heads") if family.gguf_permuted else ()
    permuted = dict(zip(names.qkv, keys, strict=False))
    return GgufNames(str(family.gguf), f"{prefix}{names.blocks}.", beside, inside, permuted)
