"""Gemma 1: Llama's names, but norms store gain − 1; post_attention_layernorm feeds the MLP."""

from __future__ import annotations

from ptq_cli.models.family import Family, Folds, Names

FAMILY = Family(
    name="gemma",
    model_types=("gemma",),
    names=Names(
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        norms={"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    ),
    plus_one=True,
    vocabularies=(256000, 256128),
    folds=Folds(),
)
