"""Qwen3: a Llama with norms on the heads of q and k, and windows from some block on."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.models.families import llama, qwen2
from ptq_cli.models.family import Family, Folds, Forward, Gguf

NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
BIASES = {"qkv": "attention_bias", "output": "attention_bias"}

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    names=replace(llama.NAMES, norms={**llama.NAMES.norms, **NORMS}),
    folds=Folds(),
    forward=Forward(
        biases=BIASES, windows=qwen2.WINDOWS, defaults=qwen2.DEFAULTS | {"head_dim": 128}
    ),
    gguf=Gguf("qwen3"),
)
