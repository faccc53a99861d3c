"""The families of models, one file each: a new one is a file and a word here.

Without config.json the first family that fits a checkpoint's names is taken, so those with more
marks come first. Many have the names of others: they are told by config.json only.
"""

from __future__ import annotations

from importlib import import_module

from ptq_cli.models.families import llama4, llava, qwen2_vl, qwen3_vl
from ptq_cli.models.family import Config, Family, Multimodal, model_type, text_config

_TOLD_BY_NAMES = "gemma3 gemma2 gemma qwen3 qwen2 llama mistral phi3 opt gpt2 bloom"
_OTHERS = """
bamba cohere cohere2 deepseek_v2 deepseek_v3 falcon gemma3n glm4 glm4_moe_lite gpt_neox gpt_oss
granite granitemoe llama4 mixtral olmo2 olmo3 qwen2_moe qwen2_vl qwen3_moe qwen3_next qwen3_vl
smollm3 starcoder2 t5
"""


def _families(names: str) -> tuple[Family, ...]:
    return tuple(import_module(f"{__name__}.{name}").FAMILY for name in names.split())


TOLD_BY_NAMES = _families(_TOLD_BY_NAMES)
FAMILIES: tuple[Family, ...] = (*TOLD_BY_NAMES, *_families(_OTHERS))
MULTIMODALS = (
    llama4.MULTIMODAL,
    llava.MULTIMODAL,
    llava.PALIGEMMA,
    qwen2_vl.MULTIMODAL,
    qwen3_vl.MULTIMODAL,
)


def text_type(config: Config) -> str | None:
    """The `model_type` of the language model, for a multimodal one that of its text."""
    if kind := model_type(text_config(config)) if text_config(config) is not config else None:
        return kind
    kind, multimodal = model_type(config), multimodal_of(config)
    return kind if multimodal is None else multimodal.model_types[str(kind)]


def known_types() -> list[str]:
    """config.json's `model_type` of all families."""
    return sorted(kind for family in FAMILIES for kind in family.model_types)


def ways_on(kind: object) -> str:
    """What can be done with a model that cannot be run here: a hint."""
    ways = (
        "bring activations of its linears with --activations, or statistics of the torch model"
        " with ptq_cli.capture"
    )
    if kind in known_types():
        return ways
    if kind is None:
        return f"config.json's model_type says which it is; else {ways}"
    return f"{ways}; [[sites]] say which of them share an input: ptq inspect --sites writes these"


def family_of(config: Config) -> Family | None:
    """The family that config.json names, for a multimodal model that of its text."""
    kinds = (text_type(config), model_type(config))
    return next((f for kind in kinds for f in FAMILIES if kind in f.model_types), None)


def multimodal_of(config: Config) -> Multimodal | None:
    """What is known of a model with towers, by its config.json."""
    kind = model_type(config)
    return next((row for row in MULTIMODALS if kind in row.model_types), None)
