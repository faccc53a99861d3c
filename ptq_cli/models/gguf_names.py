"""What GGUF files call the tensors of the families that they hold, and how these stand there: names
follow from roles."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ptq_cli.core.text import TWO_STEPS
from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES, family_of, multimodal_of
from ptq_cli.models.family import Family, model_type
from ptq_cli.models.gguf_family import GgufFamily
from ptq_cli.models.names import Names

_NORMS = {
    "attention_in": "attn_norm", "mlp_in": "ffn_norm", "q": "attn_q_norm", "k": "attn_k_norm",
    "attention_out": "post_attention_norm", "mlp_out": "post_ffw_norm",
}  # fmt: skip
_QKV = {1: ("attn_qkv",), 3: ("attn_q", "attn_k", "attn_v")}
_MLP_IN = {0: (), 1: ("ffn_up",), 2: ("ffn_gate", "ffn_up")}
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_STACKED = "_exps"  # ends the names of the linears of all experts in one tensor
# What the frequencies of rotary embeddings are divided by: no tensor of a checkpoint.
FREQUENCY_FACTORS = (
    "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
)  # fmt: skip


def is_stack(name: str) -> bool:
    """Whether a tensor in GGUF is one of all experts, by its name."""
    return name.rpartition(".")[0].endswith(_STACKED)


@dataclass(frozen=True)
class Placing:
    """How a tensor stands in the file, where that is not as in the checkpoint.

    heads: its rows have another order inside each of so many heads
    transposed: it is [in_features, out_features] in the checkpoint
    plus_one: the checkpoint has gain − 1
    exact: a matrix that stays in float32, however small a type others get
    """

    heads: int | None = None
    transposed: bool = False
    plus_one: bool = False
    exact: bool = False

    @property
    def changes(self) -> bool:
        """Whether bytes of the file are others than those of the checkpoint."""
        return self.heads is not None or self.transposed or self.plus_one


@dataclass(frozen=True)
class GgufNames:
    """The names of one family.

    towers: modules beside the text model, which are no part of the file
    variants: module → name in GGUF, for each of the ways in which checkpoints call them; the first
        "{}" stands for the number of a block, the second for that of an expert, whose tensors are
        stacked in one of all
    """

    family: Family
    gguf: GgufFamily
    variants: tuple[Mapping[str, str], ...]
    towers: tuple[str, ...] = ()

    @property
    def modules(self) -> Mapping[str, str]:
        """Those that a checkpoint has which is made from a file."""
        return self.variants[0]

    @property
    def architecture(self) -> str:
        return self.gguf.architecture

    @property
    def model_type(self) -> str:
        """config.json's for a text model alone."""
        kinds = self.family.model_types
        return next((kind for kind in kinds if kind.endswith("_text")), kinds[0])

    def tensor_name(self, name: str) -> str:
        """The name in GGUF of a tensor in a checkpoint. Raises InputError where it has none."""
        _, own, ending, numbers = self._found(name)
        return f"{own.format(*numbers)}.{ending}"

    def expert(self, name: str) -> int | None:
        """Which part of the tensor of all experts a tensor in a checkpoint is, or None."""
        _, own, _, numbers = self._found(name)
        return numbers[1] if own.endswith(_STACKED) else None

    def called_as(self, names: Collection[str]) -> GgufNames:
        """The same, but with the names that these tensors have before others."""
        patterns = {_NUMBER.sub(".{}", name).rpartition(".")[0] for name in names}

        def others(variant: Mapping[str, str]) -> int:
            return len(patterns.difference(variant))

        return replace(self, variants=tuple(sorted(self.variants, key=others)))

    def checkpoint_names(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The tensors in a checkpoint that one in GGUF is: one, or each expert's. Raises InputError
        for a name that is not known."""
        own, _, ending = name.rpartition(".")
        block = _NUMBER.search(name)
        pattern = own if block is None else own.replace(block[0], ".{}", 1)
        modules = {found: module for module, found in self.modules.items()}
        if pattern not in modules or ending not in ("weight", "bias"):
            where = f"gguf's architecture {self.architecture}"
            raise InputError(f"tensor {name!r} is not understood in {where}")
        number = () if block is None else (int(block[1]),)
        experts = [(e,) for e in range(shape[0])] if pattern.endswith(_STACKED) else [()]
        return [f"{modules[pattern].format(*number, *e)}.{ending}" for e in experts]

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is no part of the file."""
        return name.endswith(self.gguf.dropped) or self.in_a_tower(name)

    def in_a_tower(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is of the parts for images or sound."""
        return any(tower in name.split(".") for tower in self.towers)

    def _found(self, name: str) -> tuple[str, str, str, list[int]]:
        """The pattern of a module, GGUF's name for it, what ends the tensor's, and the numbers in
        it."""
        pattern, _, ending = _NUMBER.sub(".{}", name).rpartition(".")
        for variant in self.variants:
            if pattern in variant and ending in ("weight", "bias"):
                numbers = [int(number) for number in _NUMBER.findall(name)]
                return pattern, variant[pattern], ending, numbers
        where = f"gguf's architecture {self.architecture}"
        raise InputError(f"tensor {name!r} has no name in {where}", hint=TWO_STEPS)

    def placing(self, name: str, config: Mapping[str, Any]) -> Placing:
        """How a tensor of a checkpoint stands in the file. config: config.json's of the model"""
        module, own, ending, numbers = self._found(name)
        names = self.family.names
        inside = module.rpartition(".{}.")[2] if numbers else ""
        is_norm = inside in names.norms.values() or own == "output_norm"
        linears = (*names.qkv, names.output, *names.mlp_in, names.mlp_out)
        return Placing(
            heads=self._heads(inside, config),
            transposed=self.family.transposed and ending == "weight" and inside in linears,
            plus_one=self.family.plus_one and is_norm,
            exact="ffn_gate_inp" in own or own == "position_embd",
        )

    def _heads(self, inside: str, config: Mapping[str, Any]) -> int | None:
        """Heads within which GGUF orders the rows of a linear otherwise, its biases too; or
        None."""
        keys = ("num_attention_heads", "num_key_value_heads")
        for name, key in zip(self.family.names.qkv, keys, strict=False):
            if self.gguf.permuted and inside == name:
                return int(config.get(key) or config["num_attention_heads"])
        return None

    def permuted_heads(self, module: str, config: Mapping[str, Any]) -> int | None:
        """`Placing.heads` of a module's weights and biases."""
        return self.placing(f"{module}.weight", config).heads

    def module_of(self, name: str) -> str:
        """The module of a tensor in GGUF that holds one of the checkpoint. Raises InputError for a
        name that is not known."""
        return self.checkpoint_names(name, (1,))[0].rpartition(".")[0]

    def told_by_tensors(
        self, names: Collection[str], n_blocks: int, n_experts: int = 0
    ) -> dict[str, bool]:
        """What config.json says of biases and of a tied head, by a checkpoint's names. Raises
        InputError where a weight is missing, or biases are that the family does not have."""
        experts = range(n_experts or 1)
        numbers = [(block, expert) for block in range(n_blocks) for expert in experts]
        wanted = dict.fromkeys(m.format(*n) for m in self.modules for n in numbers)
        head = next((module for module, own in self.modules.items() if own == "output"), None)
        tensors = [f"{module}.weight" for module in wanted if module != head]
        tensors += [f"{module}.bias" for module in wanted if self._has_bias(module)]
        missing = [name for name in tensors if name not in names]
        if missing:
            name = self.tensor_name(missing[0])
            raise InputError(f"tensor {name!r} is missing; {len(missing)} of {len(tensors)} are")
        settings: dict[str, bool] = {"tie_word_embeddings": f"{head}.weight" not in names}
        for module, key in self._biases().items():
            own = [name for name in wanted if name.endswith(f".{module}")]
            blocks = sum(f"{name}.bias" in names for name in own)
            found = blocks > 0
            stated = settings.setdefault(key, found) if isinstance(key, str) else key
            if found != stated or blocks not in (0, len(own)):
                what = "has a bias" if not stated else "lacks its bias"
                raise InputError(f"{module} {what}, which a {self.model_type} cannot")
        return settings

    def _has_bias(self, module: str) -> bool:
        """Whether it is a LayerNorm that has a bias."""
        forward = self.family.forward
        biased = self.gguf.layer_norms and (forward is None or forward.norm_bias)
        return biased and self._found(f"{module}.weight")[1].endswith("_norm")

    def _biases(self) -> dict[str, bool | str]:
        """Modules inside a block → config.json's key for whether they have biases, or whether they
        always have."""
        names, forward = self.family.names, self.family.forward
        own = {} if forward is None else forward.biases
        parts = dict.fromkeys(names.qkv, "qkv") | {names.output: "output"}
        parts |= dict.fromkeys((*names.mlp_in, names.mlp_out), "mlp") if names.mlp_out else {}
        return {module: own.get(part, False) for module, part in parts.items()}


def names_of_model(config: Mapping[str, Any], way_out: str = TWO_STEPS) -> GgufNames:
    """The names for a config.json. Raises InputError for a model that GGUF does not hold here.

    way_out: the hint where they are not known
    """
    if not config:
        raise InputError("gguf needs the model's config.json", hint="name the model folder")
    kind = model_type(config)
    family = family_of(config)
    if family is None or family.gguf is None or kind not in family.model_types:
        known = sorted(kind for f in FAMILIES if f.gguf for kind in f.model_types)
        message = f"gguf: model_type {kind!r} is not known, only {', '.join(known)}"
        raise InputError(message, hint=way_out)
    multimodal = multimodal_of(config)
    towers = () if multimodal is None else multimodal.towers
    return replace(_names(family, family.gguf), towers=towers)


def names_of_file(architecture: str, experts: bool = False, windows: bool = False) -> GgufNames:
    """The names in a file of which a checkpoint is made again, by its `general.architecture`, and
    whether it says how many experts there are and how wide windows are. Raises InputError for
    another one."""
    known = [f for f in FAMILIES if f.gguf and f.gguf.model_class]
    found = [f for f in known if f.gguf and f.gguf.architecture == architecture]
    found.sort(
        key=lambda f: (
            (f.names.experts is not None) != experts,
            bool(f.gguf and f.gguf.window_period) != windows,
        )
    )
    if found and found[0].gguf:
        return _names(found[0], found[0].gguf)
    message = f"gguf: general.architecture {architecture!r} is not understood"
    words = ", ".join(sorted({f.gguf.architecture for f in known if f.gguf}))
    hint = f"known are {words}; every other one becomes GGUF again: --format gguf, no --tokens"
    raise InputError(message, hint=hint)


def _names(family: Family, gguf: GgufFamily) -> GgufNames:
    names, inside = family.names, _inside_a_block(family.names)
    variants = []
    for prefix in names.prefixes:
        block = f"{prefix}{names.blocks}.{{}}."
        for own, usual in (("", ""), *gguf.aliases):
            modules = {block + name.replace(usual, own, 1): to for name, to in inside.items()}
            variants.append(modules | _beside_blocks(names, gguf, prefix))
    return GgufNames(family, gguf, tuple(variants))


def _beside_blocks(names: Names, gguf: GgufFamily, prefix: str) -> dict[str, str]:
    found = {
        f"{prefix}{names.embedding}": "token_embd",
        f"{prefix}{names.final_norm}": "output_norm",
    }
    if gguf.own_head is not False:
        found[names.head] = "output"
    if names.positions is not None:
        found[f"{prefix}{names.positions}"] = "position_embd"
    return found


def _inside_a_block(names: Names) -> dict[str, str]:
    inside = {names.output: "attn_output"}
    inside |= zip(names.qkv, _QKV[len(names.qkv)], strict=True)
    if names.experts is None:  # in llama.cpp all blocks of a mixture have experts
        inside |= zip(names.mlp_in, _MLP_IN[len(names.mlp_in)], strict=True)
        inside[names.mlp_out] = "ffn_down"
    if experts := names.experts:
        inside[experts.router] = "ffn_gate_inp"
        linears = (*experts.inputs, experts.output)
        for own, name in zip(("ffn_gate", "ffn_up", "ffn_down"), linears, strict=True):
            inside[f"{experts.expert}.{name}"] = f"{own}{_STACKED}"
            if experts.shared:
                inside[f"{experts.shared}.{name}"] = f"{own}_shexp"
        if experts.shared_gate:
            inside[experts.shared_gate] = "ffn_gate_inp_shexp"
    for role, own in _NORMS.items():
        if role in names.norms:
            inside.setdefault(names.norms[role], own)  # one norm may feed both
    return {name: f"blk.{{}}.{own}" for name, own in inside.items()}
