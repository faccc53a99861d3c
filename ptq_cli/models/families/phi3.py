"""Phi-3 and Phi-4: a Llama with q, k and v in one linear, and gate and up in another."""

from dataclasses import replace
from typing import Any

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import BlockReader, Forward
from ptq_cli.models.forward.usual import attention_of
from ptq_cli.models.gguf_family import GgufFamily


def _attention(block: BlockReader) -> MultiHead:
    """What older config.json call "yarn" is longrope."""
    settings = dict(block.settings)
    for key in ("rope_scaling", "rope_parameters"):
        settings[key] = _renamed(settings.get(key))
    return attention_of(replace(block, settings=settings))


def _renamed(given: Any) -> Any:
    if not isinstance(given, dict) or given.get("rope_type", given.get("type")) != "yarn":
        return given
    return {**given, "rope_type": "longrope"}


FAMILY = Family(
    name="phi3",
    names=replace(
        llama.FAMILY.names, qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)
    ),
    defaults={
        **llama.FAMILY.defaults,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "sliding_window": None,
    },
    folds=Folds(values="q k v", inner="second half"),
    forward=Forward(partly=True, slides=lambda config, index: True, mixer=_attention),
    gguf=GgufFamily(
        "phi3", usual_heads=True, partly_rotary=True, frequency_factors=True,
        model_class="Phi3ForCausalLM",
    ),
)  # fmt: skip
