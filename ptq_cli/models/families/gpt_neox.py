"""GPT-NeoX and Pythia: q, k and v interleaved by head in one linear; attention and MLP side by side
or one after the other, each behind a norm of its own."""

from dataclasses import replace

from ptq_cli.models.family import Condition, Family, Folds, behind
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import BlockReader, Forward
from ptq_cli.models.forward.usual import attention_of
from ptq_cli.models.names import Names


def _attention(block: BlockReader) -> MultiHead:
    """Every head has a key head of its own; `num_key_value_heads` and the keys that say in other
    families how positions turn are not read."""
    settings = {
        **block.settings,
        "rope_theta": block.settings["rotary_emb_base"],
        "partial_rotary_factor": block.settings["rotary_pct"],
    }
    attention = attention_of(replace(block, settings=settings))
    return replace(attention, n_kv_heads=block.number("num_attention_heads"))


FAMILY = Family(
    name="gpt_neox",
    names=Names(
        prefixes=("gpt_neox.",),
        embedding="embed_in",
        final_norm="final_layer_norm",
        head="embed_out",
        qkv=("attention.query_key_value",),
        output="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        norms={"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    defaults={
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True,
        "attention_bias": True, "rotary_pct": 0.25, "rotary_emb_base": 10000.0,
        "max_position_embeddings": 2048,
    },
    keys={"norm_eps": "layer_norm_eps"},
    folds=Folds(
        values="q k v per head",
        inner_if=Condition("hidden_act", "relu", behind("an activation other than relu")),
    ),
    forward=Forward(
        gated=False,
        centred=True,
        partly=True,
        per_head=True,
        mixer=_attention,
        parallel=lambda config: bool(config["use_parallel_residual"]),
        biases={"qkv": "attention_bias", "output": "attention_bias", "mlp": True},
    ),
)  # fmt: skip
