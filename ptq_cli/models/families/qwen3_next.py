"""Qwen3-Next: three of four blocks have a gated delta rule instead of attention; experts, one of
them shared behind a gate."""

from dataclasses import replace

from ptq_cli.models.families import qwen3_moe
from ptq_cli.models.family import Family

FAMILY = Family(
    name="qwen3_next",
    names=replace(
        qwen3_moe.FAMILY.names,
        alike=(("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),),
        dense=("mlp.shared_expert_gate",),
    ),
)
