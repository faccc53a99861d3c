"""Gemma 3 (text): Gemma 2 with norms on the heads of q and k instead of capped scores; five of six
blocks have a window, and a rotary base of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq_cli.models.family import Family, Folds, Forward, Names, Windows


def _slides(config: Mapping[str, Any], index: int) -> bool:
    """Every sixth block is full, or every n-th by a key of older config.json."""
    given = config.get("_sliding_window_pattern") or config.get("sliding_window_pattern")
    return bool((index + 1) % (given or 6))


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    names=Names(
        prefixes=("model.", "language_model.model.", "model.language_model."),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        norms={
            "q": "self_attn.q_norm", "k": "self_attn.k_norm",
            "attention_in": "input_layernorm", "attention_out": "post_attention_layernorm",
            "mlp_in": "pre_feedforward_layernorm", "mlp_out": "post_feedforward_layernorm",
        },
    ),
    plus_one=True,
    folds=Folds(),
    forward=Forward(
        embedding_scaled=True,
        biases={"qkv": "attention_bias", "output": "attention_bias"},
        windows=Windows(_slides, by_type=True, theta=("rope_local_base_freq", 10000.0)),
        defaults={
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
            "vocab_size": 262208, "max_position_embeddings": 131072,
        },
        keys={
            "activation": "hidden_activation", "score_size": "query_pre_attn_scalar",
            "logit_softcap": "final_logit_softcapping",
        },
    ),
)  # fmt: skip
