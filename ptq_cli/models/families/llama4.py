"""Llama 4, with its vision tower or without: attention in chunks, but in every fourth block, which
turns no queries and keys; experts in every or every other block, stored as one tensor of all, and
one shared. The shares of the experts are taken of their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds, Multimodal
from ptq_cli.models.forward.attention import Packing
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.layers import Norm, Weights, apply_norm
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import BlockReader, Forward, numbers
from ptq_cli.models.forward.routers import sigmoid_router
from ptq_cli.models.forward.usual import attention_of, experts_of, mlp_of
from ptq_cli.models.names import ExpertNames

EXPERTS = ExpertNames(
    router="feed_forward.router",
    expert="feed_forward.experts.{}",
    inputs=("gate_proj", "up_proj"),
    output="down_proj",
    fused_by_loaders=False,
    linears_in=("compressed-tensors",),
    shared="feed_forward.shared_expert",
)


@dataclass(frozen=True)
class Attention(MultiHead):
    """Llama 4's.

    turned_norm: of queries and keys once they are turned
    temperature: (every, strength): the queries of position p are multiplied by
        `1 + strength · log(1 + ⌊(p + 1) / every⌋)` (arXiv 2501.19399)
    """

    turned_norm: Norm | None = None
    temperature: tuple[float, float] | None = None

    def heads(
        self, weights: Weights, inputs: FloatArray, packing: Packing, roles: str = "qkv"
    ) -> list[FloatArray]:
        named = dict(zip(roles, super().heads(weights, inputs, packing, roles), strict=True))
        for role in named.keys() & set("qk"):
            named[role] = apply_norm(self.turned_norm, weights, named[role])
        if self.temperature is not None and "q" in named:
            every, strength = (np.float32(number) for number in self.temperature)
            steps = np.floor((packing.positions.astype(np.float32) + 1) / every)
            named["q"] = named["q"] * (1 + strength * np.log1p(steps))[:, None, None]
        return [named[role] for role in roles]


def mixer(block: BlockReader) -> Branch:
    """Attention in chunks with turned queries and keys, or over all with neither."""
    settings, usual = block.settings, attention_of(block)
    turned = (block.index + 1) % block.number("no_rope_layer_interval") != 0
    if settings.get("no_rope_layers"):
        turned = bool(block.entry("no_rope_layers"))
    chunked = turned
    if settings.get("layer_types"):
        chunked = block.entry("layer_types") == "chunked_attention"
    norm = Norm(usual.module, block.norm("").eps, affine=False)
    tempered = settings["attn_temperature_tuning"] and not turned
    every, strength = block.positive("floor_scale"), block.positive("attn_scale")
    return Attention(
        **{
            **vars(usual),
            "rope": usual.rope if turned else None,
            "chunk": block.number("attention_chunk_size") if chunked else None,
        },
        turned_norm=norm if settings["use_qk_norm"] and turned else None,
        temperature=(every, strength) if tempered else None,
    )


def feed_forward(block: BlockReader) -> Branch:
    """Experts, or an MLP of a width of its own."""
    settings = block.settings
    sparse = (block.index + 1) % block.number("interleave_moe_layer_step") == 0
    if settings.get("moe_layers") is not None:
        sparse = block.index in numbers(settings, "moe_layers", block.keys)
    if not sparse:
        return mlp_of(block, block.number("intermediate_size_mlp"))
    usual = experts_of(block, EXPERTS)
    return replace(
        usual,
        weigh=lambda weights, scores: sigmoid_router(scores, usual.top_k),
        scale_inputs=True,
    )


FAMILY = Family(
    name="llama4",
    other_types=("llama4_text",),
    names=replace(
        llama.FAMILY.names,
        mlp_in=("feed_forward.gate_proj", "feed_forward.up_proj"),
        mlp_out="feed_forward.down_proj",
        experts=EXPERTS,
    ),
    defaults={
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "head_dim": 128,
        "max_position_embeddings": 131072, "intermediate_size_mlp": 16384, "norm_topk_prob": False,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "no_rope_layer_interval": 4,
        "use_qk_norm": True, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
        "floor_scale": 8192, "attn_scale": 0.1, "attention_bias": False, "num_key_value_heads": 8,
    },
    sizes={
        "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
        "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_local_experts": 16,
    },
    keys={
        "num_experts": "num_local_experts", "expert_size": "intermediate_size",
        "shared_expert_size": "intermediate_size",
    },
    folds=Folds(),
    forward=Forward(
        biases={"qkv": "attention_bias", "output": "attention_bias"},
        interleaved=True,
        mixer=mixer,
        feed_forward=feed_forward,
    ),
)  # fmt: skip

MULTIMODAL = Multimodal(
    model_types={"llama4": "llama4_text"},
    towers=("vision_model", "multi_modal_projector"),
    text_ties=("llama4",),
    text="language_model.model.",
    head="language_model.",
)
