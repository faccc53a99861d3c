"""OLMo 2: norms stand behind the branches, and on all of q and of k; none feeds a linear."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen3
from ptq_cli.models.family import Family, Folds

FAMILY = Family(
    name="olmo2",
    other_types=("olmo3",),
    names=replace(
        llama.FAMILY.names,
        norms={
            **qwen3.NORMS,
            "attention_out": "post_attention_layernorm",
            "mlp_out": "post_feedforward_layernorm",
        },
    ),
    folds=Folds(),
)
