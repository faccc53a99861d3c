"""Phi-3 and Phi-4: a Llama with q, k and v in one linear, and gate and up in another."""

from __future__ import annotations

from ptq_cli.models.family import Family, Folds, Forward, Names, Windows

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    names=Names(
        qkv=("self_attn.qkv_proj",),
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_up_proj",),
        mlp_out="mlp.down_proj",
        norms={"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    ),
    folds=Folds(values="q k v", inner="second half"),
    forward=Forward(
        windows=Windows(),
        defaults={
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "sliding_window": None,
        },
    ),
)  # fmt: skip
