"""Bamba: Mamba-2 blocks, whose Mamba linears are left alone, and some with attention."""

from dataclasses import replace

from ptq_cli.models.block_sites import attention_sites
from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, FamilySite, Folds

_NAMES = replace(
    llama.FAMILY.names,
    mlp_in=("feed_forward.gate_proj", "feed_forward.up_proj"),
    mlp_out="feed_forward.down_proj",
    norms={"attention_in": "input_layernorm", "mlp_in": "pre_ff_layernorm"},
    final_norm="final_layernorm",
    buffers=(
        *llama.FAMILY.names.buffers,
        "input_layernorm.weight",
        "mamba.A_log",
        "mamba.D",
        "mamba.dt_bias",
        "mamba.conv1d.weight",
        "mamba.conv1d.bias",
        "mamba.norm.weight",
    ),
)
_MAMBA = (
    FamilySite(("mamba.in_proj",), reason="it is a Mamba block's, which is left alone"),
    FamilySite(("mamba.out_proj",), reason="it is a Mamba block's, which is left alone"),
)

FAMILY = Family(
    name="bamba",
    names=_NAMES,
    folds=Folds(attentions=(attention_sites(_NAMES, Folds()), _MAMBA)),
)
