"""Command-R: one LayerNorm without bias feeds attention and MLP, which stand side by side; some
have norms on the heads of q and k."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen3
from ptq_cli.models.family import Family, Folds

FAMILY = Family(
    name="cohere",
    names=replace(
        llama.FAMILY.names,
        norms={"attention_in": "input_layernorm", "mlp_in": "input_layernorm"},
        buffers=(
            *llama.FAMILY.names.buffers,
            *(f"{norm}.weight" for norm in qwen3.NORMS.values()),
        ),
    ),
    defaults={"tie_word_embeddings": True},
    folds=Folds(),
)
