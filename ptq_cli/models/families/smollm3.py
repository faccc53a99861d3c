"""SmolLM3: a Llama with blocks that turn no queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq_cli.models.families import llama
from ptq_cli.models.family import Config, Family, Folds
from ptq_cli.models.forward.reader import Forward, entry, number
from ptq_cli.models.gguf_family import GgufFamily


def every_fourth_without(settings: Config) -> Mapping[str, Any]:
    """In llama.cpp every fourth block turns no queries and keys."""
    blocks = range(1, settings["num_hidden_layers"] + 1)
    return {"no_rope_layer_interval": 4, "no_rope_layers": [int(b % 4 > 0) for b in blocks]}


def turns(settings: Config, index: int) -> bool:
    """Whether a block turns queries and keys: `no_rope_layers` has a 1 for it (as it is), or where
    there is none, it is no n-th one."""
    if settings.get("no_rope_layers") is not None:
        return bool(entry(settings, "no_rope_layers", index))
    return bool((index + 1) % number(settings, "no_rope_layer_interval", {}))


FAMILY = Family(
    name="smollm3",
    names=llama.FAMILY.names,
    defaults={
        "tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 2e6, "no_rope_layer_interval": 4, "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
    },
    keys={"use_windows": "use_sliding_window"},
    folds=Folds(),
    forward=Forward(
        biases=llama.BIASES,
        turns=turns,
        slides=lambda settings, index: not turns(settings, index),
        by_type=True,
    ),
    gguf=GgufFamily(
        "smollm3", permuted=True, assumed=every_fourth_without, model_class="SmolLM3ForCausalLM"
    ),
)  # fmt: skip
