"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v, and windows from some block on."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds, Forward, Gguf, Windows

WINDOWS = Windows(
    slides=lambda config, index: bool(index >= config["max_window_layers"]),
    by_type=True,
    switch="use_sliding_window",
)

FAMILY = Family(
    name="qwen2",
    names=replace(llama.FAMILY.names, marks=("self_attn.q_proj.bias",)),
    defaults={
        **llama.FAMILY.defaults,
        "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28,
    },
    folds=Folds(),
    forward=Forward(biases={"qkv": True}, windows=WINDOWS),
    gguf=Gguf("qwen2"),
)  # fmt: skip
