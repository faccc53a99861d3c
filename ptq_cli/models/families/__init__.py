"""The families of models, one file each: a new one is a file and a line here.

Without config.json the first family that fits a checkpoint's names is taken, so those with more
marks come first.
"""

from __future__ import annotations

from ptq_cli.models.families import (
    bloom,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)

FAMILIES = (
    gemma3.FAMILY,
    gemma2.FAMILY,
    gemma.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    qwen2.FAMILY,
    llama.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    phi3.FAMILY,
    opt.FAMILY,
    gpt2.FAMILY,
    bloom.FAMILY,
)
