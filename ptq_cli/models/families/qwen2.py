"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v, and windows from some block on."""

from __future__ import annotations

from ptq_cli.models.family import Family, Folds, Forward, Gguf, Names, Windows

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    names=Names(
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        norms={"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
        marks=("self_attn.q_proj.bias",),
    ),
    folds=Folds(),
    forward=Forward(
        biases={"qkv": True},
        windows=Windows(
            slides=lambda config, index: bool(index >= config["max_window_layers"]),
            by_type=True,
            switch="use_sliding_window",
        ),
        defaults={
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    gguf=Gguf("qwen2"),
)  # fmt: skip
