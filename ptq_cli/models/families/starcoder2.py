"""StarCoder2: LayerNorms and biases, an MLP without a gate, rotary positions."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family

FAMILY = Family(
    name="starcoder2",
    names=replace(llama.FAMILY.names, mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj"),
    defaults={"tie_word_embeddings": True},
)
