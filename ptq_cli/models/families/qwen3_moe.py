"""Qwen3-MoE: Qwen3 with a mixture of experts instead of the MLP in all or some of its blocks."""

from __future__ import annotations

from ptq_cli.models.family import ExpertNames, Family, Forward, Names, Windows

FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    names=Names(
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        experts=ExpertNames(
            router="mlp.gate",
            expert="mlp.experts.{}",
            inputs=("gate_proj", "up_proj"),
            output="down_proj",
        ),
        norms={
            "attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm",
            "q": "self_attn.q_norm", "k": "self_attn.k_norm",
        },
    ),
    forward=Forward(
        biases={"qkv": "attention_bias", "output": "attention_bias"},
        windows=Windows(switch="use_sliding_window"),
        defaults={
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
            "num_experts_per_tok": 8, "decoder_sparse_step": 1, "norm_topk_prob": False,
        },
        keys={
            "num_experts": "num_local_experts", "expert_size": "moe_intermediate_size",
            "dense_blocks": "mlp_only_layers", "sparse_step": "decoder_sparse_step",
        },
    ),
)  # fmt: skip
