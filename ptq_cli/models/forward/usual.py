"""The branches that blocks of most families have: multi-head attention, an MLP or experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.experts import Experts
from ptq_cli.models.forward.mlp import MLP
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import BlockReader, numbers, real
from ptq_cli.models.forward.rope import Rope, read_rope
from ptq_cli.models.forward.routers import softmax_router
from ptq_cli.models.names import ExpertNames


def attention_of(block: BlockReader) -> MultiHead:
    """Multi-head attention of the family's names."""
    settings, names, windowed = block.settings, block.names, slides(block)
    norms, turns = norms_of(block), block.forward.turns(settings, block.index)
    return MultiHead(
        qkv=tuple(block.linear("qkv", name) for name in names.qkv),
        output=block.linear("output", names.output),
        n_heads=settings["num_attention_heads"],
        n_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        scale=_scale(block),
        norms={role: block.norm(norms[role]) for role in "qk" if role in norms},
        norm_whole=block.forward.norm_whole,
        per_head=block.forward.per_head,
        rope=rope_of(block, windowed=windowed) if turns else None,
        window=block.number("sliding_window") if windowed else None,
        softcap=_softcap(block),
    )


def feed_forward_of(block: BlockReader) -> Branch:
    """The MLP of the family's names, or the experts that stand in its place."""
    names = block.names.experts
    if names is None or not has_experts(block):
        return mlp_of(block)
    return experts_of(block, names)


def mlp_of(block: BlockReader, width: int | None = None) -> MLP:
    """The MLP of the family's names. width: if not `intermediate_size`"""
    names, settings = block.names, block.settings
    return MLP(
        inputs=tuple(block.linear("mlp", name) for name in names.mlp_in),
        output=block.linear("mlp", names.mlp_out),
        width=settings["intermediate_size"] if width is None else width,
        activation=settings["activation"],
        gated=block.forward.gated,
    )


def has_experts(block: BlockReader) -> bool:
    """Whether config.json gives the block experts, not an MLP."""
    settings = block.settings
    dense = block.index in numbers(settings, "dense_blocks", block.keys)
    every = block.number("sparse_step") if "sparse_step" in settings else 1
    return not dense and (block.index + 1) % every == 0


def experts_of(block: BlockReader, names: ExpertNames) -> Experts:
    """The experts of the family's names, weighed by the softmax of the router's scores."""
    paths = [names.expert.format(e) for e in range(block.count("num_experts"))]
    top_k = min(block.number("num_experts_per_tok"), len(paths))
    width = block.number("expert_size")
    normalised = bool(block.settings["norm_topk_prob"])
    shared_gate = block.linear("router", names.shared_gate) if names.shared_gate else None
    return Experts(
        router=block.linear("router", names.router),
        experts=tuple(expert_of(block, names, path, width, "experts") for path in paths),
        top_k=top_k,
        weigh=lambda weights, scores: softmax_router(scores, top_k, normalised=normalised),
        hidden_size=block.settings["hidden_size"],
        shared=shared_of(block, names),
        shared_gate=shared_gate,
    )


def expert_of(block: BlockReader, names: ExpertNames, path: str, width: int, part: str) -> MLP:
    """One expert. path: its inner name; width: of its last linear's inputs; part: as of
    `BlockReader.linear`"""
    return MLP(
        inputs=tuple(block.linear(part, f"{path}.{name}") for name in names.inputs),
        output=block.linear(part, f"{path}.{names.output}"),
        width=width,
        activation=block.settings["activation"],
    )


def shared_of(block: BlockReader, names: ExpertNames) -> MLP | None:
    """The expert that every token goes through, where the family has one."""
    if not names.shared:
        return None
    return expert_of(block, names, names.shared, block.number("shared_expert_size"), "mlp")


def norms_of(block: BlockReader) -> dict[str, str]:
    """The names of the norms of a block, by role."""
    given = block.forward.norms
    return dict(block.names.norms if given is None else given(block.settings))


def _softcap(block: BlockReader) -> float | None:
    if block.settings.get("attention_softcap") is None:
        return None
    return real(block.settings, "attention_softcap", block.keys, least=0)


def _scale(block: BlockReader) -> float:
    settings = block.settings
    if settings.get("attention_scale") is not None:
        return real(settings, "attention_scale", block.keys, least=0)
    sized = settings.get("score_size") is not None
    scale = block.positive("score_size" if sized else "head_dim") ** -0.5
    if not settings.get("scale_scores", True):
        scale = 1.0
    return float(scale / (block.index + 1) if settings.get("scale_by_depth") else scale)


def slides(block: BlockReader) -> bool:
    """Whether a block's tokens see a window only."""
    settings, index = block.settings, block.index
    if settings.get("sliding_window") is None or not settings.get("use_windows", True):
        return False
    if not settings.get("layer_types") or not block.forward.by_type:
        return block.forward.slides(settings, index)
    kind = block.entry("layer_types")
    if kind not in ("full_attention", "sliding_attention"):
        raise InputError(f"config.json's layer type {kind!r} is not known")
    return bool(kind == "sliding_attention")


def rope_of(block: BlockReader, *, windowed: bool = False, size: int | None = None) -> Rope:
    """How positions turn the queries and keys of a block.

    transformers 5 writes `rope_parameters`; before it, `rope_theta` stood beside `rope_scaling`.
    windowed: whether the block has a window; size: channels of a head, if not head_dim
    """
    _check_rope(block)
    settings = block.settings
    by_type = settings.get("local_rope_theta") is not None
    parameters = dict(settings.get("rope_scaling") or settings.get("rope_parameters") or {})
    if by_type:
        parameters = _of_its_type(block, windowed)
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = settings["rope_theta"]
    partial = settings.get("partial_rotary_factor")
    parameters.setdefault("partial_rotary_factor", 1.0 if partial is None else partial)
    if not block.forward.partly:
        _leave_unread(parameters)
    return read_rope(
        parameters,
        settings["head_dim"] if size is None else size,
        block.number("max_position_embeddings"),
        None if by_type else settings.get("original_max_position_embeddings"),
        block.forward.interleaved,
    )


def _of_its_type(block: BlockReader, windowed: bool) -> dict[str, Any]:
    """The parameters of a family that has some for each type of block (Gemma 3, OLMo 3):
    `rope_scaling` changes those of full blocks, and of `rope_parameters` for all blocks only
    `truncate` is read."""
    settings = block.settings
    given = settings.get("rope_parameters") or {}
    own = given.get("sliding_attention" if windowed else "full_attention")
    parameters = {"rope_type": "default"} if own is None else dict(own)
    if not windowed:
        parameters |= settings.get("rope_scaling") or {}
    theta = settings["local_rope_theta" if windowed else "rope_theta"]
    return {"rope_theta": theta, **parameters, "truncate": given.get("truncate", True)}


def _check_rope(block: BlockReader) -> None:
    """Refuse what is no object, and what is no positive number."""
    for key in ("rope_scaling", "rope_parameters"):
        value = block.settings.get(key)
        if not isinstance(value or {}, Mapping):
            raise InputError(f"config.json's {key} is {value!r}; an object is needed")
    for key in ("rope_theta", "local_rope_theta"):
        if block.settings.get(key) is not None:
            block.positive(key)


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
