"""Llama, and the many models that are built as it is."""

from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily
from ptq_cli.models.names import Names

BIASES = {"qkv": "attention_bias", "output": "attention_bias", "mlp": "mlp_bias"}

FAMILY = Family(
    name="llama",
    names=Names(
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        norms={"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    ),
    defaults={
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
    },
    sizes={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    folds=Folds(),
    forward=Forward(biases=BIASES),
    gguf=GgufFamily(
        "llama", permuted=True, biases=True, frequency_factors=True,
        model_class="LlamaForCausalLM",
    ),
)  # fmt: skip
