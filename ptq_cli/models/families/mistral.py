"""Mistral: a Llama whose blocks all have a sliding window."""

from __future__ import annotations

from ptq_cli.models.family import Family, Folds, Forward, Names, Windows

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    names=Names(
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        norms={"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    ),
    folds=Folds(),
    forward=Forward(
        windows=Windows(),
        defaults={
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "max_position_embeddings": 131072, "sliding_window": 4096,
        },
    ),
)  # fmt: skip
