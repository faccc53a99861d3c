"""config.json -> `Architecture`: everything the forward needs to know, as one frozen value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.family import Config, ExpertNames, Family, Forward
from ptq_cli.models.forward.layers import ACTIVATIONS, Linear, Norm
from ptq_cli.models.forward.rope import Rope, not_known, read_rope

WORKSPACE = 16 << 20  # scores, chunks of activation functions, rotations of short batches


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

    @property
    def attention(self) -> str:
        """The module that caches keys and values."""
        return self.qkv[0].name.rpartition(".")[0]


@dataclass(frozen=True)
class Architecture:
    """A model as its forward needs to know it.

    embedding, positions, head: names of tensors; head is the embedding where they are tied
    projections: linears around the blocks where the embedding is narrower (OPT-350M), or none
    """

    family: str
    forward: Forward
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    activation: str
    blocks: tuple[Block, ...]
    embedding: str
    head: str
    final_norm: Norm | None
    positions: str | None = None
    projections: tuple[Linear, ...] = ()
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def head_module(self) -> str:
        return self.head.removesuffix(".weight")

    def has_head(self, tensors: Collection[str]) -> bool:
        """Whether there is a head of its own, and what its inputs come from.

        tensors: names in the checkpoint
        """
        norm = self.final_norm
        normed = norm is None or not norm.affine or f"{norm.name}.weight" in tensors
        return self.head != self.embedding and self.head in tensors and normed

    def block_memory(self, n_tokens: int) -> int:
        """Bytes, at most, that `forward_block` needs for `n_tokens` packed tokens: its input, its
        output and what lies between, in float32, without the block's weights."""
        query, shared = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 4 * query + 5 * shared
        experts = [block.experts for block in self.blocks if block.experts]
        routed = max((e.top_k * (e.width + self.hidden_size) for e in experts), default=0)
        mlp = max(4 * self.intermediate_size, 3 * routed)
        return 4 * n_tokens * (4 * self.hidden_size + max(attention, mlp)) + WORKSPACE

    def state_memory(self, n_tokens: int) -> int:
        """Bytes of a `State` between two stages, at most: the residual and the next inputs."""
        experts = [block.experts for block in self.blocks if block.experts]
        routed = max((e.top_k * max(e.width, self.hidden_size) for e in experts), default=0)
        inputs = max(self.hidden_size, self.n_heads * self.head_dim, self.intermediate_size, routed)
        return 4 * n_tokens * (self.hidden_size + inputs)


def read_architecture(config: Config, tensors: Collection[str] = ()) -> Architecture:
    """The architecture that `config` (config.json) describes.

    tensors: names in the checkpoint; they tell which prefix it uses where a family has several.
    Raises InputError for a `model_type` or a setting that is not known.
    """
    kind = config.get("model_type")
    known = {kind: family for family in FAMILIES if family.forward for kind in family.model_types}
    family = known.get(str(kind))
    if family is None or family.forward is None:
        raise not_known(f"no forward for model_type {kind!r}", known)
    config, names, forward = _settings(config, family), family.names, family.forward
    found = (p for p in names.prefixes if f"{p}{names.embedding}.weight" in tensors)
    prefix = next(found, names.prefixes[0])
    embedding = f"{prefix}{names.embedding}.weight"
    head = f"{names.head}.weight"
    # a head that is stored beside its embedding may be another, whatever config.json says
    tied = bool(config.get("tie_word_embeddings")) and head not in tensors
    narrow = (config.get("embedding_size") or config["hidden_size"]) != config["hidden_size"]
    bare = config.get("no_final_norm") or not config.get("norm_first", True)
    return Architecture(
        family=str(kind),
        forward=forward,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab_size=_number(config, "vocab_size"),
        activation=config["activation"],
        blocks=tuple(
            _block(config, family, forward, prefix, index)
            for index in range(config["num_hidden_layers"])
        ),
        embedding=embedding,
        head=embedding if tied else head,
        final_norm=None if bare else _norm(config, family, f"{prefix}{names.final_norm}"),
        positions=f"{prefix}{names.positions}.weight" if names.positions else None,
        projections=tuple(Linear(prefix + name) for name in names.projections if narrow),
        attention_softcap=config.get("attention_softcap"),
        logit_softcap=config.get("logit_softcap"),
    )


def _settings(config: Config, family: Family) -> dict[str, Any]:
    """The family's settings, checked, with the sizes that follow from others."""
    full = family.settings(config)
    hidden, heads = _number(full, "hidden_size"), _number(full, "num_attention_heads")
    _number(full, "num_hidden_layers")
    full["num_key_value_heads"] = full.get("num_key_value_heads") or heads
    full["head_dim"] = full.get("head_dim") or hidden // heads
    full["intermediate_size"] = full.get("intermediate_size") or 4 * hidden
    full["activation"] = full["activation"] or full.get("hidden_act")
    if heads % full["num_key_value_heads"]:
        raise InputError(
            f"config.json has {heads} attention heads, not a multiple of "
            f"{full['num_key_value_heads']} key heads"
        )
    if full.get("use_bidirectional_attention"):
        raise InputError("config.json asks for bidirectional attention; only causal is known")
    if full["activation"] not in ACTIVATIONS:
        what = f"config.json's activation {full['activation']!r} is not known"
        raise not_known(what, ACTIVATIONS)
    return full


def _number(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"config.json's {key} is {value!r}; a positive whole number is needed")
    return value


def _norm(config: Config, family: Family, name: str) -> Norm:
    return Norm(
        name=name,
        eps=float(config["norm_eps"]),
        centred=family.forward is not None and family.forward.centred,
        offset=1.0 if family.plus_one else 0.0,
        affine=bool(config.get("norm_affine", True)),
    )


def _block(config: Config, family: Family, forward: Forward, prefix: str, index: int) -> Block:
    names = family.names
    base = f"{prefix}{names.blocks}.{index}."

    def linear(part: str, name: str) -> Linear:
        bias = forward.biases.get(part, False)
        has = bool(config.get(bias)) if isinstance(bias, str) else bias
        return Linear(base + name, has, family.transposed)

    slides = _slides(config, forward, index)
    before = config.get("norm_first", True)
    return Block(
        qkv=tuple(linear("qkv", name) for name in names.qkv),
        output=linear("output", names.output),
        mlp_in=tuple(linear("mlp", name) for name in names.mlp_in),
        mlp_out=linear("mlp", names.mlp_out),
        experts=_experts(config, names.experts, base, index),
        norms={
            role if before else role.replace("_in", "_sum"): _norm(config, family, base + name)
            for role, name in names.norms.items()
        },
        rope=_rope(config, forward, slides) if forward.rotary else None,
        window=_number(config, "sliding_window") if slides else None,
        scale=_scale(config, index),
    )


def _scale(config: Config, index: int) -> float:
    scale = (config.get("score_size") or config["head_dim"]) ** -0.5
    if not config.get("scale_scores", True):
        scale = 1.0
    return float(scale / (index + 1) if config.get("scale_by_depth") else scale)


def _slides(config: Config, forward: Forward, index: int) -> bool:
    """Whether a block's tokens see a window only."""
    if config.get("sliding_window") is None or not config.get("use_windows", True):
        return False
    types = config.get("layer_types")
    if not types or not forward.by_type:
        return forward.slides(config, index)
    if types[index] not in ("full_attention", "sliding_attention"):
        raise InputError(f"config.json's layer type {types[index]!r} is not known")
    return bool(types[index] == "sliding_attention")


def _rope(config: Config, forward: Forward, slides: bool) -> Rope:
    """transformers 5 writes `rope_parameters`, in Gemma 3 one for each type of block; before it,
    `rope_theta` stood beside `rope_scaling`, which in Gemma 3 is for the full blocks only."""
    local = config.get("local_rope_theta") if slides else None
    kind = "sliding_attention" if slides else "full_attention"
    given = config.get("rope_parameters") or {}
    nested = given.get(kind) if kind in given else ({} if local else given)
    scaling = None if local else config.get("rope_scaling")
    parameters = dict(scaling or nested or {})
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = local or config["rope_theta"]
    parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if not forward.partly:
        _leave_unread(parameters)
    return read_rope(
        parameters,
        config["head_dim"],
        _number(config, "max_position_embeddings"),
        config.get("original_max_position_embeddings"),
    )


def _leave_unread(parameters: dict[str, Any]) -> None:
    """Drop the partial factor, which the family does not know: transformers reads it only where
    frequencies are stretched, and its forward then fails, as they are fewer than a head has.

    Raises:
        InputError: such a stretching.
    """
    factor = parameters.pop("partial_rotary_factor")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if factor != 1 and kind != "default":
        raise InputError(
            f"config.json's partial_rotary_factor {factor} has no meaning with rotary embeddings of"
            f" type {kind!r} in this family; transformers cannot run it either",
            hint="remove partial_rotary_factor from config.json",
        )


def _experts(config: Config, names: ExpertNames | None, base: str, index: int) -> Experts | None:
    """The experts of a block, or None where it has an MLP."""
    dense = names is None or index in (config.get("dense_blocks") or ())
    if names is None or dense or (index + 1) % config.get("sparse_step", 1):
        return None
    paths = [base + names.expert.format(e) for e in range(_number(config, "num_experts"))]
    return Experts(
        router=Linear(f"{base}{names.router}"),
        inputs=tuple(tuple(Linear(f"{path}.{name}") for name in names.inputs) for path in paths),
        outputs=tuple(Linear(f"{path}.{names.output}") for path in paths),
        width=_number(config, "expert_size"),
        top_k=min(_number(config, "num_experts_per_tok"), len(paths)),
        normalised=bool(config["norm_topk_prob"]),
    )
