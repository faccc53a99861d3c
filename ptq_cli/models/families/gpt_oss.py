"""gpt-oss: attention with sinks and a window in every second block; experts of a clamped SwiGLU,
stored as one tensor of all."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds, behind
from ptq_cli.models.forward.attention import HeadBias
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.layers import Clamp, fetch
from ptq_cli.models.forward.reader import BlockReader, Forward
from ptq_cli.models.forward.usual import attention_of, experts_of
from ptq_cli.models.names import ExpertNames

EXPERTS = ExpertNames(
    router="mlp.router",
    expert="mlp.experts.{}",
    inputs=("gate_proj", "up_proj"),
    output="down_proj",
    interleaved=True,
    fused_by_loaders=False,
)
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def mixer(block: BlockReader) -> Branch:
    """Attention with a sink for each head."""
    sinks, settings = f"{block.base}self_attn.sinks", dict(block.settings)
    if settings["rope_parameters"] is None:  # also where config.json says null
        settings["rope_parameters"] = _YARN
    return replace(
        attention_of(replace(block, settings=settings)),
        bias=lambda weights, packing: HeadBias(fetch(weights, sinks)),
        vectors=(sinks,),
    )


def feed_forward(block: BlockReader) -> Branch:
    """Experts whose gates and products are clamped."""
    usual = experts_of(block, EXPERTS)
    clamp = Clamp(block.positive("swiglu_alpha"), block.positive("swiglu_limit"))
    return replace(usual, experts=tuple(replace(mlp, clamp=clamp) for mlp in usual.experts))


FAMILY = Family(
    name="gpt_oss",
    names=replace(
        llama.FAMILY.names,
        mlp_in=(),
        mlp_out="",
        experts=EXPERTS,
        buffers=(*llama.FAMILY.names.buffers, "self_attn.sinks"),
    ),
    defaults={
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 128,
        "num_experts_per_tok": 4, "attention_bias": True, "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rope_parameters": _YARN,
    },
    keys={"num_experts": "num_local_experts", "expert_size": "intermediate_size"},
    fixed={"norm_topk_prob": True},
    folds=Folds(inner_reason=behind("a clamped swiglu")),
    forward=Forward(
        biases={
            "qkv": "attention_bias", "output": "attention_bias", "router": True, "experts": True
        },
        slides=lambda config, index: index % 2 == 0,
        by_type=True,
        mixer=mixer,
        feed_forward=feed_forward,
    ),
)  # fmt: skip
