"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one shared by all tokens behind a gate."""

from dataclasses import replace

from ptq_cli.models.families import qwen2, qwen3_moe
from ptq_cli.models.family import Family, Folds

EXPERTS = replace(
    qwen3_moe.EXPERTS, shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"
)

FAMILY = Family(
    name="qwen2_moe",
    names=replace(qwen2.FAMILY.names, experts=EXPERTS),
    folds=Folds(),
)
