"""OPT: LayerNorms, learned positions, biases, relu. OPT-350M has its norms behind the sums and a
narrower embedding."""

from dataclasses import replace

from ptq_cli.models.family import Condition, Family, Folds, behind
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import BlockReader, Forward, never
from ptq_cli.models.forward.usual import attention_of
from ptq_cli.models.names import Names


def _attention(block: BlockReader) -> MultiHead:
    """As many key heads as heads, whatever `num_key_value_heads` says."""
    return replace(attention_of(block), n_kv_heads=block.number("num_attention_heads"))


FAMILY = Family(
    name="opt",
    names=Names(
        prefixes=("model.decoder.", "decoder."),
        final_norm="final_layer_norm",
        positions="embed_positions",
        projections=("project_in", "project_out"),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.out_proj",
        mlp_in=("fc1",),
        mlp_out="fc2",
        norms={"attention_in": "self_attn_layer_norm", "mlp_in": "final_layer_norm"},
        buffers=(),
    ),
    defaults={
        "activation_function": "relu", "layer_norm_eps": 1e-5, "tie_word_embeddings": True,
        "enable_bias": True, "layer_norm_elementwise_affine": True,
        "do_layer_norm_before": True, "max_position_embeddings": 2048,
    },
    keys={
        "activation": "activation_function", "intermediate_size": "ffn_dim",
        "norm_eps": "layer_norm_eps", "norm_affine": "layer_norm_elementwise_affine",
        "norm_first": "do_layer_norm_before", "no_final_norm": "_remove_final_layer_norm",
        "embedding_size": "word_embed_proj_dim",
    },
    folds=Folds(
        norm_if=Condition(
            "do_layer_norm_before",
            True,
            "its inputs are also the residual (do_layer_norm_before is false)",
            evidence="final_layer_norm.weight",
        ),
        inner_if=Condition("activation_function", "relu", behind("an activation other than relu")),
    ),
    forward=Forward(
        gated=False,
        centred=True,
        turns=never,
        position_offset=2,
        position_counts=True,
        mixer=_attention,
        biases={"qkv": "enable_bias", "output": "enable_bias", "mlp": "enable_bias"},
    ),
)  # fmt: skip
