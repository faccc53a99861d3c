"""config.json -> `Architecture`: everything the forward needs to know, as one frozen value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.models.forward.layers import ACTIVATIONS, Linear, Norm
from ptq_cli.models.forward.rope import Rope, read_rope
from ptq_cli.models.table import FAMILIES, Family

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes through `top_k` of them.

    router: linear whose softmax weighs the experts; `normalised` makes the top_k weights sum to 1
    inputs, outputs: the linears of each expert, (gate, up) and down
    width: in_features of the latter
    """

    router: Linear
    inputs: tuple[tuple[Linear, ...], ...]
    outputs: tuple[Linear, ...]
    width: int
    top_k: int
    normalised: bool


@dataclass(frozen=True)
class Block:
    """One block of the model.

    qkv: three linears, or one that is fused; output: the linear after attention
    mlp_in: (gate, up), (fused,) or (up,), mlp_out: down; both unused where there are `experts`
    norms: by role: attention_in and mlp_in before a branch, attention_out and mlp_out after it,
        attention_sum and mlp_sum after its sum with the residual, q and k on heads
    window: tokens that a token sees, itself included, or None for all
    scale: of the scores
    """

    qkv: tuple[Linear, ...]
    output: Linear
    mlp_in: tuple[Linear, ...]
    mlp_out: Linear
    experts: Experts | None
    norms: Mapping[str, Norm]
    rope: Rope | None
    window: int | None
    scale: float


@dataclass(frozen=True)
class Architecture:
    """A model as its forward needs to know it.

    embedding, positions, head: names of tensors; head is the embedding where they are tied
    embedding_scale: factor of the embeddings (Gemma)
    position_offset, position_counts: row of `positions` for column 0; whether padding is skipped
    project_in, project_out: linears around the blocks where the embedding is narrower (OPT-350M)
    """

    family: str
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    activation: str
    gated: bool
    blocks: tuple[Block, ...]
    embedding: str
    embedding_scale: float
    head: str
    final_norm: Norm | None
    positions: str | None = None
    position_offset: int = 0
    position_counts: bool = False
    project_in: Linear | None = None
    project_out: Linear | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None


def read_architecture(config: Config, tensors: Collection[str] = ()) -> Architecture:
    """The architecture that `config` (config.json) describes.

    tensors: names in the checkpoint; they tell which prefix it uses where a family has several.
    Raises InputError for a `model_type` or a setting that is not known.
    """
    name, family, config = _family(config)
    prefix = _prefix(family, tensors)
    embedding = f"{prefix}{family.embedding}.weight"
    width = config.get("word_embed_proj_dim") or config["hidden_size"]
    narrow = width != config["hidden_size"]
    return Architecture(
        family=name,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab_size=_number(config, "vocab_size"),
        activation=_activation(config, family),
        gated=family.gated,
        blocks=tuple(
            _block(config, family, prefix, index) for index in range(config["num_hidden_layers"])
        ),
        embedding=embedding,
        embedding_scale=config["hidden_size"] ** 0.5 if family.embedding_scaled else 1.0,
        head=embedding if config.get("tie_word_embeddings") else f"{family.head}.weight",
        final_norm=_final_norm(config, family, prefix),
        positions=f"{prefix}{family.positions}.weight" if family.positions else None,
        position_offset=family.position_offset,
        position_counts=family.position_counts,
        project_in=Linear(f"{prefix}project_in") if narrow else None,
        project_out=Linear(f"{prefix}project_out") if narrow else None,
        attention_softcap=config.get("attn_logit_softcapping")
        if family.attention_softcap
        else None,
        logit_softcap=config.get("final_logit_softcapping"),
    )


def _family(config: Config) -> tuple[str, Family, dict[str, Any]]:
    """The family's name, its data, and the config with defaults and this module's words."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise InputError(
            f"no forward for model_type {name!r}; known are {', '.join(sorted(FAMILIES))}",
            hint="bring activations with --activations, which works for any model",
        )
    family = FAMILIES[name]
    full = {**family.defaults, **(config.get("text_config") or config)}
    for word, key in family.aliases.items():
        if full.get(word) is None:
            full[word] = full.get(key)
    hidden, heads = _number(full, "hidden_size"), _number(full, "num_attention_heads")
    _number(full, "num_hidden_layers")
    full["num_key_value_heads"] = full.get("num_key_value_heads") or heads
    full["head_dim"] = full.get("head_dim") or hidden // heads
    full["intermediate_size"] = full.get("intermediate_size") or 4 * hidden
    if heads % full["num_key_value_heads"]:
        raise InputError(
            f"config.json has {heads} attention heads, not a multiple of "
            f"{full['num_key_value_heads']} key heads"
        )
    if full.get("use_bidirectional_attention"):
        raise InputError("config.json asks for bidirectional attention; only causal is known")
    return name, family, full


def _number(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"config.json's {key} is {value!r}; a positive whole number is needed")
    return value


def _activation(config: Config, family: Family) -> str:
    name = config.get(family.activation) or config.get("hidden_act")
    if name not in ACTIVATIONS:
        raise InputError(
            f"config.json's activation {name!r} is not known; known are "
            f"{', '.join(sorted(ACTIVATIONS))}",
            hint="bring activations with --activations, which works for any model",
        )
    return str(name)


def _prefix(family: Family, tensors: Collection[str]) -> str:
    found = (p for p in family.prefixes if f"{p}{family.embedding}.weight" in tensors)
    return next(found, family.prefixes[0])


def _norm(config: Config, family: Family, name: str) -> Norm:
    return Norm(
        name=name,
        eps=float(config[family.norm_eps]),
        centred=family.centred,
        offset=family.norm_offset,
        affine=bool(config.get("layer_norm_elementwise_affine", True)),
    )


def _final_norm(config: Config, family: Family, prefix: str) -> Norm | None:
    absent = config.get("_remove_final_layer_norm") or not config.get("do_layer_norm_before", True)
    return None if absent else _norm(config, family, f"{prefix}{family.final_norm}")


def _block(config: Config, family: Family, prefix: str, index: int) -> Block:
    base = f"{prefix}{family.blocks}.{index}."

    def linear(part: str, name: str) -> Linear:
        bias = family.biases.get(part, False)
        has = bool(config.get(bias)) if isinstance(bias, str) else bias
        return Linear(base + name, has, family.transposed)

    kind = _layer_type(config, family, index)
    before = config.get("do_layer_norm_before", True)
    return Block(
        qkv=tuple(linear("qkv", name) for name in family.qkv),
        output=linear("output", family.output),
        mlp_in=tuple(linear("mlp", name) for name in family.mlp_in),
        mlp_out=linear("mlp", family.mlp_out),
        experts=_experts(config, family, base) if _is_sparse(config, family, index) else None,
        norms={
            role if before else role.replace("_in", "_sum"): _norm(config, family, base + name)
            for role, name in family.norms.items()
        },
        rope=_rope(config, family, kind) if family.rotary else None,
        window=_number(config, "sliding_window") if kind == "sliding_attention" else None,
        scale=_scale(config, index),
    )


def _scale(config: Config, index: int) -> float:
    scale = (config.get("query_pre_attn_scalar") or config["head_dim"]) ** -0.5
    if not config.get("scale_attn_weights", True):
        scale = 1.0
    by_depth = config.get("scale_attn_by_inverse_layer_idx")
    return float(scale / (index + 1) if by_depth else scale)


def _layer_type(config: Config, family: Family, index: int) -> str:
    """ "full_attention" or "sliding_attention"."""
    off = family.window_switch and not config.get(family.window_switch)
    if family.window is None or off or config.get("sliding_window") is None:
        return "full_attention"
    if family.window == "all":
        return "sliding_attention"
    if types := config.get("layer_types"):
        if types[index] not in ("full_attention", "sliding_attention"):
            raise InputError(f"config.json's layer type {types[index]!r} is not known")
        return str(types[index])
    if pattern := config.get("_sliding_window_pattern") or config.get("sliding_window_pattern"):
        return "sliding_attention" if (index + 1) % pattern else "full_attention"
    return "sliding_attention" if index >= config["max_window_layers"] else "full_attention"


def _rope(config: Config, family: Family, kind: str) -> Rope:
    """transformers 5 writes `rope_parameters`, in Gemma 3 one for each type of block; before it,
    `rope_theta` stood beside `rope_scaling`, which in Gemma 3 is for the full blocks only."""
    local = family.local_theta if kind == "sliding_attention" else None
    given = config.get("rope_parameters") or {}
    nested = given.get(kind) if kind in given else ({} if local else given)
    scaling = config.get("rope_scaling")
    parameters = dict((None if local else scaling) or nested or {})
    key, theta = local or ("rope_theta", config["rope_theta"])
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = config.get(key, theta)
    parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    return read_rope(
        parameters,
        config["head_dim"],
        _number(config, "max_position_embeddings"),
        config.get("original_max_position_embeddings"),
    )


def _is_sparse(config: Config, family: Family, index: int) -> bool:
    if family.router is None or index in (config.get("mlp_only_layers") or ()):
        return False
    return bool((index + 1) % config.get("decoder_sparse_step", 1) == 0)


def _experts(config: Config, family: Family, base: str) -> Experts:
    names = [base + family.expert.format(e) for e in range(_number(config, "num_experts"))]
    return Experts(
        router=Linear(f"{base}{family.router}"),
        inputs=tuple(tuple(Linear(f"{n}.{part}") for part in family.expert_in) for n in names),
        outputs=tuple(Linear(f"{n}.{family.expert_out}") for n in names),
        width=_number(config, "expert_size"),
        top_k=min(_number(config, "num_experts_per_tok"), len(names)),
        normalised=bool(config["norm_topk_prob"]),
    )
