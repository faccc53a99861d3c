"""GPT-2: LayerNorms, learned positions, biases, gelu; its linears store [in, out] (Conv1D)."""

from ptq_cli.models.family import Family, Folds, behind
from ptq_cli.models.forward.reader import Forward, never
from ptq_cli.models.gguf_family import GgufFamily
from ptq_cli.models.names import Names

FAMILY = Family(
    name="gpt2",
    names=Names(
        prefixes=("transformer.", ""),
        blocks="h",
        embedding="wte",
        final_norm="ln_f",
        positions="wpe",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        norms={"attention_in": "ln_1", "mlp_in": "ln_2"},
        buffers=("attn.bias", "attn.masked_bias"),
    ),
    transposed=True,
    defaults={
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "scale_attn_weights": True, "n_positions": 1024,
    },
    keys={
        "activation": "activation_function", "norm_eps": "layer_norm_epsilon",
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head", "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions", "scale_scores": "scale_attn_weights",
        "scale_by_depth": "scale_attn_by_inverse_layer_idx",
    },
    folds=Folds(values="q k v", inner_reason=behind("gelu")),
    forward=Forward(
        gated=False,
        centred=True,
        turns=never,
        biases={"qkv": True, "output": True, "mlp": True},
    ),
    gguf=GgufFamily(
        "gpt2",
        layer_norms=True,
        activations=("gelu_new", "gelu_pytorch_tanh"),
        assumed=lambda settings: {
            "scale_scores": True, "scale_by_depth": False,
            "num_key_value_heads": settings["num_attention_heads"],
        },
        dropped=(".attn.bias", ".attn.masked_bias"),
        model_class="GPT2LMHeadModel",
    ),
)  # fmt: skip
