"""StarCoder2: LayerNorms and biases, an MLP without a gate, rotary positions."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Condition, Family, Folds, behind
from ptq_cli.models.forward.reader import Forward, always
from ptq_cli.models.gguf_family import GgufFamily

FAMILY = Family(
    name="starcoder2",
    names=replace(llama.FAMILY.names, mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj"),
    defaults={
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "norm_epsilon": 1e-5,
        "use_bias": True, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
    },
    keys={"norm_eps": "norm_epsilon"},
    folds=Folds(
        inner_if=Condition("hidden_act", "relu", behind("an activation other than relu")),
    ),
    forward=Forward(
        gated=False,
        centred=True,
        biases={"qkv": "use_bias", "output": "use_bias", "mlp": "use_bias"},
        slides=always,
    ),
    gguf=GgufFamily(
        "starcoder2",
        layer_norms=True,
        usual_heads=True,
        activations=("gelu_pytorch_tanh", "gelu_new"),
        assumed=lambda settings: {"use_bias": True},
        model_class="Starcoder2ForCausalLM",
    ),
)  # fmt: skip
