"""BLOOM: LayerNorms, biases, gelu, ALiBi; q, k and v interleaved by head in one linear."""

from ptq_cli.models.family import Condition, Family, Folds, behind
from ptq_cli.models.names import Names

FAMILY = Family(
    name="bloom",
    names=Names(
        prefixes=("transformer.", ""),
        blocks="h",
        embedding="word_embeddings",
        final_norm="ln_f",
        qkv=("self_attention.query_key_value",),
        output="self_attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        norms={"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
        buffers=(),
    ),
    defaults={"apply_residual_connection_post_layernorm": False, "tie_word_embeddings": True},
    keys={"num_attention_heads": "n_head"},
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
)
