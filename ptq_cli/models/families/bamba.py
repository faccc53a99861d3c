"""Bamba: Mamba-2 blocks, and some with attention."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family

FAMILY = Family(
    name="bamba",
    names=replace(
        llama.FAMILY.names,
        mlp_in=("feed_forward.gate_proj", "feed_forward.up_proj"),
        mlp_out="feed_forward.down_proj",
        norms={"attention_in": "input_layernorm", "mlp_in": "pre_ff_layernorm"},
    ),
)
