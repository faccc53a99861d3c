"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v, and windows from some block on."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Config, Family, Folds
from ptq_cli.models.forward.reader import Forward, number
from ptq_cli.models.gguf_family import GgufFamily


def slides(config: Config, index: int) -> bool:
    """Whether a block has a window."""
    return index >= number(config, "max_window_layers", {}, least=0)


FAMILY = Family(
    name="qwen2",
    names=replace(llama.FAMILY.names, marks=("self_attn.q_proj.bias",)),
    defaults={
        **llama.FAMILY.defaults,
        "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "num_key_value_heads": 32,
    },
    sizes={
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    keys={"use_windows": "use_sliding_window"},
    folds=Folds(),
    forward=Forward(biases={"qkv": True}, slides=slides, by_type=True),
    gguf=GgufFamily("qwen2", usual_heads=True, model_class="Qwen2ForCausalLM"),
)  # fmt: skip
