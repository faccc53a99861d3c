"""Gemma 1: Llama's names, but norms store gain − 1; post_attention_layernorm feeds the MLP."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.gguf_family import GgufFamily

_TANH = ("gelu_pytorch_tanh", "gelu_new")
GGUF = GgufFamily("gemma", activations=_TANH, own_head=False)  # and of later Gemmas

FAMILY = Family(
    name="gemma",
    names=llama.FAMILY.names,
    plus_one=True,
    vocabularies=(256000, 256128),
    defaults={
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
    },
    keys={"activation": "hidden_activation"},
    folds=Folds(),
    # "gelu" is a slip of the first release's config.json: it was trained with tanh
    gguf=replace(GGUF, activations=(*_TANH, "gelu")),
)  # fmt: skip
