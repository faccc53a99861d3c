"""gpt-oss: attention with sinks, and experts stored as one tensor of all."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds, behind
from ptq_cli.models.names import ExpertNames

FAMILY = Family(
    name="gpt_oss",
    names=replace(
        llama.FAMILY.names,
        mlp_in=(),
        mlp_out="",
        experts=ExpertNames(
            router="mlp.router",
            expert="mlp.experts.{}",
            inputs=("gate_proj", "up_proj"),
            output="down_proj",
            interleaved=True,
            fused_by_loaders=False,
        ),
        buffers=(*llama.FAMILY.names.buffers, "self_attn.sinks"),
    ),
    folds=Folds(inner_reason=behind("a clamped swiglu")),
)
