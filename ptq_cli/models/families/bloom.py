"""BLOOM: LayerNorms, biases, gelu, ALiBi; q, k and v interleaved by head in one linear."""

from dataclasses import replace

import numpy as np

from ptq_cli.models.family import Condition, Family, Folds, behind
from ptq_cli.models.forward.attention import HeadBias, Packing, alibi_slopes
from ptq_cli.models.forward.layers import Weights
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import BlockReader, Forward, never
from ptq_cli.models.forward.usual import attention_of
from ptq_cli.models.names import Names


def _attention(block: BlockReader) -> MultiHead:
    n_heads = block.number("num_attention_heads")
    slopes = alibi_slopes(n_heads)[:, None]

    def bias(weights: Weights, packing: Packing) -> HeadBias:
        return HeadBias(keys=slopes * np.arange(packing.mask.shape[1], dtype=np.float32))

    return replace(attention_of(block), n_kv_heads=n_heads, bias=bias)


FAMILY = Family(
    name="bloom",
    names=Names(
        prefixes=("transformer.", ""),
        blocks="h",
        embedding="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        final_norm="ln_f",
        qkv=("self_attention.query_key_value",),
        output="self_attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        norms={"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
        buffers=(),
    ),
    defaults={
        "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
    },
    fixed={"activation": "gelu_pytorch_tanh"},
    keys={
        "norm_eps": "layer_norm_epsilon", "hidden_size": "n_embed", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "residual_normed": "apply_residual_connection_post_layernorm",
    },
    folds=Folds(
        values="q k v per head",
        norm_if=Condition(
            "apply_residual_connection_post_layernorm",
            False,
            "its inputs are also the residual (apply_residual_connection_post_layernorm is true)",
            published=True,
        ),
        inner_reason=behind("gelu"),
    ),
    forward=Forward(
        gated=False,
        centred=True,
        turns=never,
        per_head=True,
        biases={"qkv": True, "output": True, "mlp": True},
        mixer=_attention,
    ),
)  # fmt: skip
