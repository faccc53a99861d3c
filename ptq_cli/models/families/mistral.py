"""Mistral: a Llama whose blocks all have a sliding window."""

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily

FAMILY = Family(
    name="mistral",
    names=llama.FAMILY.names,
    defaults={
        **llama.FAMILY.defaults,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
    sizes={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    folds=Folds(),
    forward=Forward(slides=lambda config, index: True),
    gguf=GgufFamily("llama", permuted=True),  # read again as a Llama
)  # fmt: skip
