"""Command-R: one LayerNorm without bias feeds attention and MLP, which stand side by side."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen3
from ptq_cli.models.family import Family

FAMILY = Family(
    name="cohere",
    other_types=("cohere2",),
    names=replace(llama.FAMILY.names, norms={**qwen3.NORMS, "attention_in": "input_layernorm"}),
    defaults={"tie_word_embeddings": True},
)
