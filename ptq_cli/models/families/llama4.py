"""Llama 4 (text): experts in every other block, stored as one tensor of all, and one shared. The
shares of the experts are taken of their inputs."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.names import ExpertNames

FAMILY = Family(
    name="llama4",
    other_types=("llama4_text",),
    names=replace(
        llama.FAMILY.names,
        mlp_in=("feed_forward.gate_proj", "feed_forward.up_proj"),
        mlp_out="feed_forward.down_proj",
        experts=ExpertNames(
            router="feed_forward.router",
            expert="feed_forward.experts.{}",
            inputs=("gate_proj", "up_proj"),
            output="down_proj",
            fused_by_loaders=False,
            linears_in=("compressed-tensors",),
            shared="feed_forward.shared_expert",
        ),
    ),
    folds=Folds(),
)
