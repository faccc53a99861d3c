"""The families of models as a table: which linears share an input, and what feeds them.

A row states one decoder block. `Family.sites` lists its sites in the order they are computed;
names are those inside the block (`self_attn.q_proj` for `model.layers.3.self_attn.q_proj.weight`).
As stated by transformers' modeling files, checked against them in tests/interop.

Gemma's norms store `gain − 1`. Gemma 1 names its norms as Llama does, and post_attention_layernorm
feeds the MLP; in Gemma 2 and 3 that name belongs to a norm *behind* the attention, which feeds no
linear, and pre_feedforward_layernorm feeds the MLP. Norms behind a linear (post_*) stay as they
are: folding never changes what a site gives out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptq_cli.models.sites import Layout


@dataclass(frozen=True)
class Condition:
    """What config.json has to say for a fold to be right.

    value: what `key` must be; default: what the key's absence means
    reason: why the site is left alone otherwise
    evidence: without config.json, a tensor beside the blocks whose presence stands for `value`
    published: without config.json and evidence, whether to take `value` for granted, as it holds
        for every published model of the family (the result notes it), or to leave the site alone
    """

    key: str
    value: object
    default: object
    reason: str
    evidence: str | None = None
    published: bool = False


@dataclass(frozen=True)
class SitePattern:
    """A site inside a block; fed by `norm`, or by `after` laid out as `layout`, or by nothing that
    takes factors, for `reason`."""

    linears: tuple[str, ...]
    norm: str | None = None
    after: str | None = None
    layout: Layout = "all"
    conditions: tuple[Condition, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Family:
    """One row of the table.

    model_types: config.json's `model_type`
    container: the list of blocks, `<prefix>.<container>.<number>.`
    plus_one: norms store gain − 1
    transposed: linears are stored [in_features, out_features]
    others: tensors of a block that are neither linears nor norms of its sites, and harmless
    marks: tensors without which a block is not of this family (for detection by names alone)
    vocabularies: without config.json, sizes of the vocabulary that tell this family from another
        with the same names; None where names suffice
    """

    name: str
    model_types: tuple[str, ...]
    sites: tuple[SitePattern, ...]
    container: str = "layers"
    plus_one: bool = False
    transposed: bool = False
    others: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    vocabularies: tuple[int, ...] | None = None


def _gated(mlp_norm: str) -> tuple[SitePattern, ...]:
    """Llama's block: q, k, v; o; gate, up; down."""
    q, k, v, o = (f"self_attn.{x}_proj" for x in "qkvo")
    return (
        SitePattern((q, k, v), norm="input_layernorm"),
        SitePattern((o,), after=v, layout="heads"),
        SitePattern(("mlp.gate_proj", "mlp.up_proj"), norm=mlp_norm),
        SitePattern(("mlp.down_proj",), after="mlp.up_proj"),
    )


def _behind(activation: str) -> str:
    return f"it is behind {activation}, which does not commute with a scale"


_ROTARY = ("self_attn.rotary_emb.inv_freq",)
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_LLAMA = _gated("post_attention_layernorm")
_GEMMA2 = _gated("pre_feedforward_layernorm")
_GEMMA2_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")

_PHI3 = (
    SitePattern(("self_attn.qkv_proj",), norm="input_layernorm"),
    SitePattern(("self_attn.o_proj",), after="self_attn.qkv_proj", layout="q k v"),
    SitePattern(("mlp.gate_up_proj",), norm="post_attention_layernorm"),
    SitePattern(("mlp.down_proj",), after="mlp.gate_up_proj", layout="second half"),
)

_NORM_FIRST = Condition(
    "do_layer_norm_before",
    True,
    True,
    "its inputs are also the residual (do_layer_norm_before is false)",
    evidence="final_layer_norm.weight",
)
_RELU = Condition("activation_function", "relu", "relu", _behind("an activation other than relu"))
_OPT = (
    SitePattern(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        norm="self_attn_layer_norm",
        conditions=(_NORM_FIRST,),
    ),
    SitePattern(("self_attn.out_proj",), after="self_attn.v_proj", layout="heads"),
    SitePattern(("fc1",), norm="final_layer_norm", conditions=(_NORM_FIRST,)),
    SitePattern(("fc2",), after="fc1", conditions=(_RELU,)),
)

_GPT2 = (
    SitePattern(("attn.c_attn",), norm="ln_1"),
    SitePattern(("attn.c_proj",), after="attn.c_attn", layout="q k v"),
    SitePattern(("mlp.c_fc",), norm="ln_2"),
    SitePattern(("mlp.c_proj",), reason=_behind("gelu")),
)

_RESIDUAL_BEFORE = Condition(
    "apply_residual_connection_post_layernorm",
    False,
    False,
    "its inputs are also the residual (apply_residual_connection_post_layernorm is true)",
    published=True,
)
_BLOOM = (
    SitePattern(
        ("self_attention.query_key_value",),
        norm="input_layernorm",
        conditions=(_RESIDUAL_BEFORE,),
    ),
    SitePattern(
        ("self_attention.dense",),
        after="self_attention.query_key_value",
        layout="q k v per head",
    ),
    SitePattern(
        ("mlp.dense_h_to_4h",), norm="post_attention_layernorm", conditions=(_RESIDUAL_BEFORE,)
    ),
    SitePattern(("mlp.dense_4h_to_h",), reason=_behind("gelu")),
)

# Detection by names takes the first row that fits: rows with more marks come first.
FAMILIES = (
    Family(
        "gemma3",
        ("gemma3_text", "gemma3"),
        _GEMMA2,
        plus_one=True,
        others=(*_ROTARY, *_HEAD_NORMS, *_GEMMA2_NORMS),
        marks=(*_HEAD_NORMS, *_GEMMA2_NORMS),
    ),
    Family(
        "gemma2",
        ("gemma2",),
        _GEMMA2,
        plus_one=True,
        others=(*_ROTARY, *_GEMMA2_NORMS),
        marks=_GEMMA2_NORMS,
    ),
    Family(
        "gemma",
        ("gemma",),
        _LLAMA,
        plus_one=True,
        others=_ROTARY,
        vocabularies=(256000, 256128),
    ),
    Family("qwen3", ("qwen3",), _LLAMA, others=(*_ROTARY, *_HEAD_NORMS), marks=_HEAD_NORMS),
    Family("qwen2", ("qwen2",), _LLAMA, others=_ROTARY, marks=("self_attn.q_proj.bias",)),
    Family("llama", ("llama",), _LLAMA, others=_ROTARY),
    Family("mistral", ("mistral",), _LLAMA, others=_ROTARY),
    Family("phi3", ("phi3",), _PHI3, others=_ROTARY),
    Family("opt", ("opt",), _OPT),
    Family(
        "gpt2",
        ("gpt2",),
        _GPT2,
        container="h",
        transposed=True,
        others=("attn.bias", "attn.masked_bias"),
    ),
    Family("bloom", ("bloom",), _BLOOM, container="h"),
)

BY_NAME = {family.name: family for family in FAMILIES}
BY_MODEL_TYPE = {kind: family for family in FAMILIES for kind in family.model_types}
