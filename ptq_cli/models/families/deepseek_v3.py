"""DeepSeek-V3: queries, and keys with values, through narrow linears (MLA); experts in groups with
shared ones beside them, but for the first blocks."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.families import llama, qwen3_moe
from ptq_cli.models.family import Family, FamilySite, Folds
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.experts import Experts
from ptq_cli.models.forward.latent_attention import LatentAttention
from ptq_cli.models.forward.layers import Linear, Norm, Weights, fetch
from ptq_cli.models.forward.reader import BlockReader, Forward, number
from ptq_cli.models.forward.routers import Groups, corrected_router
from ptq_cli.models.forward.usual import experts_of, mlp_of, rope_of

_BEHIND_KV_A = (
    FamilySite(("self_attn.kv_b_proj",), norm="self_attn.kv_a_layernorm"),
    FamilySite(("self_attn.o_proj",), after="self_attn.kv_b_proj", layout="k v per head"),
)
EXPERTS = replace(qwen3_moe.EXPERTS, shared="mlp.shared_experts")
NAMES = replace(
    llama.FAMILY.names,
    qkv=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    experts=EXPERTS,
    buffers=(*llama.FAMILY.names.buffers, "mlp.gate.e_score_correction_bias"),
)
FOLDS = Folds(
    attentions=(
        (
            FamilySite(
                ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), norm="input_layernorm"
            ),
            FamilySite(("self_attn.q_b_proj",), norm="self_attn.q_a_layernorm"),
            *_BEHIND_KV_A,
        ),
        (
            FamilySite(
                ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), norm="input_layernorm"
            ),
            *_BEHIND_KV_A,
        ),
    ),
)


def latent_attention(block: BlockReader) -> Branch:
    """MLA; without `q_lora_rank` the queries come from one linear."""
    settings = block.settings
    narrow = settings["q_lora_rank"] is not None
    still, turned = block.number("qk_nope_head_dim"), block.number("qk_rope_head_dim")
    rope = rope_of(block, size=turned)
    queries = block.linear("down", "self_attn.q_a_proj") if narrow else _up(block, "q_proj")
    return LatentAttention(
        first=(queries, block.linear("down", "self_attn.kv_a_proj_with_mqa")),
        query_up=_up(block, "q_b_proj") if narrow else None,
        query_norm=_norm(block, "q_a_layernorm") if narrow else None,
        key_value_up=_up(block, "kv_b_proj"),
        norm=_norm(block, "kv_a_layernorm"),
        output=block.linear("output", block.names.output),
        n_heads=settings["num_attention_heads"],
        still=still,
        turned=turned,
        value_size=block.number("v_head_dim"),
        rank=block.number("kv_lora_rank"),
        query_rank=block.number("q_lora_rank") if narrow else 0,
        scale=float((still + turned) ** -0.5 * rope.score_factor),
        rope=replace(rope, interleaved=bool(settings["rope_interleave"])),
    )


def _up(block: BlockReader, name: str) -> Linear:
    """A linear that gives all heads; none has a bias."""
    return Linear(f"{block.base}self_attn.{name}")


def _norm(block: BlockReader, name: str) -> Norm:
    """The norm of a narrow vector; config.json's `rms_norm_eps` is not for it."""
    return replace(block.norm(f"self_attn.{name}"), eps=1e-6)


def feed_forward(block: BlockReader) -> Branch:
    """An MLP in the first blocks, then experts."""
    if block.index < number(block.settings, "first_k_dense_replace", block.keys, least=0):
        return mlp_of(block)
    return experts(block)


def experts(block: BlockReader) -> Experts:
    """Experts that the sigmoids of the router's scores choose and weigh."""
    usual, settings, some = with_shared(block), block.settings, groups(block)
    correction = f"{block.base}{EXPERTS.router}.e_score_correction_bias"
    normalised = bool(settings["norm_topk_prob"])
    factor = block.positive("routed_scaling_factor")

    def weigh(weights: Weights, scores: FloatArray) -> FloatArray:
        return corrected_router(
            scores,
            fetch(weights, correction),
            usual.top_k,
            groups=some,
            normalised=normalised,
            factor=factor,
        )

    return replace(usual, weigh=weigh, vectors=(correction,))


def with_shared(block: BlockReader) -> Experts:
    """The usual experts, with `n_shared_experts` side by side as one."""
    size = block.number("n_shared_experts") * block.number("expert_size")
    return experts_of(
        replace(block, settings={**block.settings, "shared_expert_size": size}), EXPERTS
    )


def groups(block: BlockReader) -> Groups:
    """The groups of experts.

    Raises:
        InputError: they do not divide the experts, or a token may go to more than there are.
    """
    found = Groups(block.number("n_group"), block.number("topk_group"))
    count = block.number("num_experts")
    if count % found.count or found.kept > found.count:
        raise InputError(
            f"config.json has {count} experts in n_group {found.count} groups, of which a token"
            f" goes to topk_group {found.kept}: they do not fit together"
        )
    return found


FORWARD = Forward(
    biases={"down": "attention_bias", "output": "attention_bias"},
    mixer=latent_attention,
    feed_forward=feed_forward,
)

FAMILY = Family(
    name="deepseek_v3",
    other_types=("kimi_k2",),
    names=NAMES,
    defaults={
        **llama.FAMILY.defaults,
        "max_position_embeddings": 4096, "attention_bias": False, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "rope_interleave": True, "first_k_dense_replace": 3, "n_routed_experts": 256,
        "moe_intermediate_size": 2048, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    keys={"num_experts": "n_routed_experts", "expert_size": "moe_intermediate_size"},
    folds=FOLDS,
    forward=FORWARD,
)  # fmt: skip
