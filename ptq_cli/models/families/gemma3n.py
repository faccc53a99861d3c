"""Gemma 3n's text model: Gemma 3 with four streams between blocks, which matrices of their width
predict and correct."""

from dataclasses import replace

from ptq_cli.models.families import gemma3
from ptq_cli.models.family import Family

FAMILY = Family(
    name="gemma3n",
    other_types=("gemma3n_text",),
    defaults={"tie_word_embeddings": True},
    names=replace(
        gemma3.FAMILY.names,
        dense=("altup.correction_coefs", "altup.prediction_coefs", "altup.modality_router"),
    ),
)
