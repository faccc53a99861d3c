"""Mistral: a Llama whose blocks all have a sliding window."""

from __future__ import annotations

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds, Forward, Windows

FAMILY = Family(
    name="mistral",
    names=llama.FAMILY.names,
    defaults={
        **llama.FAMILY.defaults,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    folds=Folds(),
    forward=Forward(windows=Windows()),
)
