"""Qwen3-Next: three of four blocks have a gated delta rule instead of attention, whose values pass
a sigmoid gate of each channel; experts, one of them shared behind a gate. Norms store gain − 1, but
for that behind the delta rule."""

from dataclasses import replace

from ptq_cli.models.block_sites import attention_sites
from ptq_cli.models.families import qwen2_moe, qwen3_moe
from ptq_cli.models.family import Family, FamilySite, Folds

_NAMES = replace(
    qwen3_moe.FAMILY.names,
    experts=qwen2_moe.EXPERTS,
    alike=(("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),),
    buffers=(
        *qwen3_moe.FAMILY.names.buffers,
        "linear_attn.A_log",
        "linear_attn.dt_bias",
        "linear_attn.conv1d.weight",
        "linear_attn.norm.weight",
    ),
)
_DELTA_RULE = (
    FamilySite(_NAMES.alike[0], norm="input_layernorm"),
    FamilySite(
        ("linear_attn.out_proj",), reason="the norm that feeds it has the same gains for all heads"
    ),
)

FAMILY = Family(
    name="qwen3_next",
    names=_NAMES,
    plus_one=True,
    folds=Folds(attentions=(attention_sites(_NAMES, Folds()), _DELTA_RULE)),
)
