"""Gemma 1: Llama's names, but norms store gain − 1; post_attention_layernorm feeds the MLP."""

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds

FAMILY = Family(
    name="gemma",
    names=llama.FAMILY.names,
    plus_one=True,
    vocabularies=(256000, 256128),
    defaults={"tie_word_embeddings": True},
    folds=Folds(),
)
