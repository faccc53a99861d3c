"""GLM-4: norms on both sides of a branch; gate and up in one linear."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds

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
    folds=Folds(inner="second half"),
)  # fmt: skip
