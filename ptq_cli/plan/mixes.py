"""llama.cpp's mixes: which of ggml's types each tensor of a GGUF file gets, by its name there.

A mix has one type for most tensors, and others where rounding costs most: attn_v, ffn_down and
attn_output of some blocks, the head. The facts are those of llama.cpp's `llama_model_quantize`
(src/llama-quant.cpp, release v0.5.0), its fallbacks for widths that blocks do not divide included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ptq_cli.core.names import natural
from ptq_cli.formats.gguf.types import TYPES

DENSE_TYPES = ("F32", "F16", "BF16")
# What a type becomes where a row is no whole number of its blocks. The flat ones have none.
FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}  # fmt: skip
LAST_RESORT = "F16"  # where that one does not fit either

_ROLES = (
    ("output", re.compile(r"^output\.weight$")),
    ("token_embd", re.compile(r"^(per_layer_)?token_embd\.weight$")),
    ("attn_v", re.compile(r"attn_(v|qkv|kv_b)\.weight")),
    ("attn_k", re.compile(r"attn_k\.weight")),
    ("attn_output", re.compile(r"attn_output\.weight")),
    ("ffn_down", re.compile(r"ffn_down")),
)
# Matrices that stay as they are: norms, routers, places, and what is small.
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp(_shexp)?\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight|^token_types\.weight|ssm_conv1d|shortconv\.conv\.weight"
    r"|indexer\.[kq]_proj\.weight|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd"
    r"|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
_EIGHT = 8  # experts of the models that the rules for mixtures were made for
# Models of 70 billion parameters, as llama.cpp tells them: architecture → blocks.
_LARGE = {"llama": 80, "qwen2": 80, "deci": 80, "jais2": 68}


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model.

    blocks: general ones and those that only predict ahead
    heads, kv_heads: of an attention
    experts: of a mixture, 0: it is none
    important: whether it is known which inputs matter (tokens, activations, an imatrix)
    """

    architecture: str
    blocks: int
    heads: int = 1
    kv_heads: int = 1
    experts: int = 0
    important: bool = False

    @property
    def heads_share(self) -> bool:
        """Whether four heads or more share their keys and values."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= 4

    @property
    def eight(self) -> bool:
        return self.experts == _EIGHT

    @property
    def large(self) -> bool:
        shares = self.architecture != "llama" or self.heads != self.kv_heads
        return _LARGE.get(self.architecture) == self.blocks and shares and not self.eight


@dataclass(frozen=True)
class _Place:
    """A tensor among those of its role: number `index` of `count`."""

    index: int
    count: int
    facts: ModelFacts


_Rule = tuple[Callable[[_Place], bool], str]


def _always(place: _Place) -> bool:
    return True


def _outer(place: _Place) -> bool:
    """The first and last eighth, and every third between."""
    first, index = place.count // 8, place.index
    return index < first or index >= 7 * place.count // 8 or (index - first) % 3 == 2


def _heads_share(place: _Place) -> bool:
    return place.facts.heads_share


def _within(part: int, important: bool | None = None) -> Callable[[_Place], bool]:
    """In the first 1/part of the blocks, and where it is known, or not, which inputs matter."""

    def holds_at(place: _Place) -> bool:
        return place.index < place.count // part and important in (None, place.facts.important)

    return holds_at


def _first(count: int) -> Callable[[_Place], bool]:
    return lambda place: place.index < count


@dataclass(frozen=True)
class Mix:
    """A mix. file_type: its number in general.file_type; main: the type of most tensors

    rules: by role, of which the first that holds counts; falcon: what differs in that architecture
    eight: the type of attn_output where there are eight experts; "" is `main`
    """

    file_type: int
    main: str
    rules: Mapping[str, tuple[_Rule, ...]] = field(default_factory=dict)
    falcon: Mapping[str, tuple[_Rule, ...]] = field(default_factory=dict)
    eight: str = ""

    def rules_of(self, role: str, facts: ModelFacts) -> tuple[_Rule, ...]:
        if facts.architecture == "falcon":
            return {**self.rules, "attn_output": (), **self.falcon}.get(role, ())
        return self.rules.get(role, ())


def _all(kind: str) -> tuple[_Rule, ...]:
    return ((_always, kind),)


_SIX = ((_outer, "Q6_K"),)
_IQ4 = {"attn_v": ((_heads_share, "Q5_K"),), "ffn_down": ((_within(8, False), "Q5_K"),)}

MIXES = {
    "Q4_0": Mix(2, "Q4_0", {"ffn_down": ((_within(8, True), "Q4_1"),)}),
    "Q4_1": Mix(3, "Q4_1"),
    "Q5_0": Mix(8, "Q5_0", {"ffn_down": ((_within(8, True), "Q5_1"),)}),
    "Q5_1": Mix(9, "Q5_1"),
    "Q8_0": Mix(7, "Q8_0"),
    "Q2_K": Mix(
        10,
        "Q2_K",
        {
            "attn_v": ((_heads_share, "Q4_K"), (_always, "Q3_K")),
            "ffn_down": _all("Q3_K"),
            "attn_output": _all("Q3_K"),
        },
        eight="Q5_K",
    ),
    "Q2_K_S": Mix(
        21,
        "Q2_K",
        {"attn_v": ((_heads_share, "Q4_K"),), "ffn_down": ((_within(8), "Q4_K"),)},
    ),
    "Q3_K_S": Mix(11, "Q3_K", eight="Q5_K"),
    "Q3_K_M": Mix(
        12,
        "Q3_K",
        {
            "attn_v": ((_first(2), "Q5_K"), (_always, "Q4_K")),
            "ffn_down": ((_within(16), "Q5_K"), (_always, "Q4_K")),
            "attn_output": _all("Q4_K"),
        },
        falcon={"ffn_down": ((_within(16), "Q5_K"), (_outer, "Q4_K"))},
        eight="Q5_K",
    ),
    "Q3_K_L": Mix(
        13,
        "Q3_K",
        dict.fromkeys(("attn_v", "ffn_down", "attn_output"), _all("Q5_K")),
        falcon=dict.fromkeys(("ffn_down", "attn_output"), _all("Q4_K")),
    ),
    "Q4_K_S": Mix(
        14,
        "Q4_K",
        {"attn_v": ((_first(4), "Q5_K"),), "ffn_down": ((_within(8), "Q5_K"),)},
        falcon={"ffn_down": ()},
        eight="Q5_K",
    ),
    "Q4_K_M": Mix(
        15,
        "Q4_K",
        {"attn_v": _SIX, "ffn_down": _SIX},
        falcon={"ffn_down": ((_within(16), "Q6_K"), (_outer, "Q5_K"))},
        eight="Q5_K",
    ),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_K_M": Mix(17, "Q5_K", {"attn_v": _SIX, "ffn_down": _SIX}),
    "Q6_K": Mix(18, "Q6_K"),
    "IQ4_NL": Mix(25, "IQ4_NL", _IQ4, eight="Q5_K"),
    "IQ4_XS": Mix(30, "IQ4_XS", _IQ4, eight="Q5_K"),
    "MXFP4_MOE": Mix(38, "MXFP4"),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
MIX_NAMES = (*MIXES, *ALIASES)
NEEDS_IMPORTANCE = ("Q2_K_S",)  # llama.cpp refuses it without an importance matrix
_EXPERTS_ONLY = "MXFP4_MOE"  # its type is that of experts


def is_mix(scheme: str) -> bool:
    return scheme in MIX_NAMES


def mix_name(name: str) -> str:
    """The name itself, or that which it is short for."""
    return ALIASES.get(name, name)


def mix_named(name: str) -> Mix:
    """The mix of that name."""
    return MIXES[mix_name(name)]


def role_of(name: str) -> str:
    """What a tensor is, by its name in GGUF; "other" where no rule asks."""
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


def is_rounded(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantizes a tensor: matrices, of all experts or one, but for some."""
    matrix = len(shape) > 1 and any(size > 1 for size in shape[:-1])
    return matrix and name.endswith("weight") and not _KEPT.search(name)


def holds(kind: str, columns: int) -> bool:
    """Whether rows of so many columns can be of a type."""
    return kind in DENSE_TYPES or columns % TYPES[kind].block == 0


def fallback(kind: str, columns: int) -> str:
    """The type itself where it holds the rows, or what llama.cpp takes for it; the type itself,
    too, where it has nothing to take."""
    if holds(kind, columns) or kind not in FALLBACKS:
        return kind
    other = FALLBACKS[kind]
    return other if holds(other, columns) else LAST_RESORT


def mix_types(
    mix: str, facts: ModelFacts, tensors: Mapping[str, tuple[int, ...]], pure: bool = False
) -> dict[str, str]:
    """The type of each tensor that a mix rounds.

    tensors: all of the model by their names in GGUF, with their shapes
        [experts, out_features, in_features], experts only where there are some
    pure: the main type wherever it fits
    """
    own, tied = mix_named(mix), not any(role_of(name) == "output" for name in tensors)
    names = [name for name in sorted(tensors, key=natural) if is_rounded(name, tensors[name])]
    places = _places(names, facts)
    found = {}
    for name in names:
        shape, kind = tensors[name], own.main
        if not pure:
            role = "output" if tied and role_of(name) == "token_embd" else role_of(name)
            kind = _type(own, role, places[name], shape)
        found[name] = fallback(kind, shape[-1])
    return found


def _places(names: Iterable[str], facts: ModelFacts) -> dict[str, _Place]:
    """Where each tensor stands among those of its role; of a mixture's ffn_down the block counts,
    and there are as many as blocks always."""
    of_role: dict[str, list[str]] = {}
    for name in names:
        of_role.setdefault(role_of(name), []).append(name)
    found = {}
    for role, own in of_role.items():
        for index, name in enumerate(own):
            block = re.match(r"blk\.(\d+)\.", name)
            by_block = role == "ffn_down" and facts.experts > 1 and block is not None
            place = int(block[1]) if by_block and block else index
            count = facts.blocks if role == "ffn_down" else len(own)
            found[name] = _Place(place, count, facts)
    return found


def _type(mix: Mix, role: str, place: _Place, shape: tuple[int, ...]) -> str:
    """The type of a tensor before its width is looked at."""
    facts, experts_only = place.facts, mix is MIXES[_EXPERTS_ONLY]
    if role == "output":
        fits = holds(mix.main, shape[-1]) and facts.architecture != "falcon" and not experts_only
        return "Q6_K" if fits and mix.main != "Q8_0" else "Q8_0"
    if experts_only:
        return mix.main if len(shape) > 2 and shape[0] > 1 else "Q8_0"
    if facts.eight and role in ("attn_v", "attn_k"):
        return "Q8_0"
    if facts.eight and role == "attn_output" and facts.architecture != "falcon":
        return mix.eight or mix.main
    rules = mix.rules_of(role, facts)
    kind = next((kind for holds_at, kind in rules if holds_at(place)), mix.main)
    if role == "attn_v" and facts.large and kind in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return kind
