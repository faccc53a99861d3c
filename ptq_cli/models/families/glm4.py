"""GLM-4: norms on both sides of a branch; half of a head's channels turn, neighbours together; gate
and up in one linear."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily

FAMILY = Family(
    name="glm4",
    names=replace(
        llama.FAMILY.names,
        mlp_in=("mlp.gate_up_proj",),
        norms={
            "attention_in": "input_layernorm", "attention_out": "post_self_attn_layernorm",
            "mlp_in": "post_attention_layernorm", "mlp_out": "post_mlp_layernorm",
        },
    ),
    defaults={
        "hidden_act": "silu", "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0, "head_dim": 128,
        "partial_rotary_factor": 0.5, "attention_bias": True, "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
    },
    folds=Folds(inner="second half"),
    forward=Forward(partly=True, interleaved=True, biases={"qkv": "attention_bias"}),
    gguf=GgufFamily(
        "glm4", biases=True, partly_rotary=True, model_class="Glm4ForCausalLM"
    ),
)  # fmt: skip
