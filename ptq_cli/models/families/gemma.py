"""Gemma 1: Llama's names, but norms store gain − 1; post_attention_layernorm feeds the MLP."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen3
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.mlp import MLP
from ptq_cli.models.forward.reader import BlockReader, Forward
from ptq_cli.models.forward.usual import mlp_of
from ptq_cli.models.gguf_family import GgufFamily

_TANH = ("gelu_pytorch_tanh", "gelu_new")
GGUF = GgufFamily("gemma", activations=_TANH, own_head=False)  # and of later Gemmas


def _mlp(block: BlockReader) -> MLP:
    """What the first release's config.json calls "gelu" was trained with tanh."""
    mlp = mlp_of(block)
    return replace(mlp, activation=_TANH[0]) if mlp.activation == "gelu" else mlp


FAMILY = Family(
    name="gemma",
    names=llama.FAMILY.names,
    plus_one=True,
    vocabularies=(256000, 256128),
    defaults={
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
    },
    folds=Folds(),
    forward=Forward(embedding_scaled=True, biases=qwen3.BIASES, feed_forward=_mlp),
    gguf=replace(GGUF, activations=(*_TANH, "gelu"), model_class="GemmaForCausalLM"),
)  # fmt: skip
