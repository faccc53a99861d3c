"""The families of models, one file each: a new one is a file and a word here.

Without config.json the first family that fits a checkpoint's names is taken, so those with more
marks come first.
"""

from __future__ import annotations

from importlib import import_module

from ptq_cli.models.family import Family

_ORDER = "gemma3 gemma2 gemma qwen3 qwen3_moe qwen2 llama mistral mixtral phi3 opt gpt2 bloom"

FAMILIES: tuple[Family, ...] = tuple(
    import_module(f"{__name__}.{name}").FAMILY for name in _ORDER.split()
)
