"""SmolLM3: a Llama with blocks that turn no queries and keys."""

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds

FAMILY = Family(
    name="smollm3",
    names=llama.FAMILY.names,
    defaults={"tie_word_embeddings": True},
    folds=Folds(),
)
