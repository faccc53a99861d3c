"""GraniteMoE: Granite with a mixture of experts instead of the MLP, stored as one tensor of all."""

from dataclasses import replace

from ptq_cli.models.families import granite, llama
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.names import ExpertNames

FAMILY = Family(
    name="granitemoe",
    names=replace(
        llama.FAMILY.names,
        mlp_in=(),
        mlp_out="",
        experts=ExpertNames(
            router="block_sparse_moe.router.layer",
            expert="block_sparse_moe.experts.{}",
            inputs=("gate_proj", "up_proj"),
            output="down_proj",
            fused_by_loaders=False,
        ),
    ),
    defaults={
        **granite.FAMILY.defaults,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    keys={
        **granite.FAMILY.keys,
        "num_experts": "num_local_experts", "expert_size": "intermediate_size",
    },
    fixed={"norm_topk_prob": True},
    folds=Folds(),
    forward=Forward(biases=llama.BIASES),
)  # fmt: skip
