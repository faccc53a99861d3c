"""Heads that are the embedding: where config.json ties the two, one tensor is both.

Once one of the two is quantized and both are stored, they are no longer the same, and config.json
must say so: transformers raises on a quantized head that is tied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ptq_cli.models.families import FAMILIES, family_of, multimodal_of
from ptq_cli.models.family import Config, model_type, text_config

KEY = "tie_word_embeddings"
_HEADS = {family.names.head for family in FAMILIES}
_EMBEDDINGS = {family.names.embedding for family in FAMILIES} | {"tok_embeddings", "shared"}
_INSIDE = re.compile(r"\.\d+\.")  # of a block


def ties(config: Config) -> bool:
    """Whether the head is the embedding, by config.json or, where it says nothing, by what
    transformers takes for granted: the family's default, true for families not known here."""
    stated, multimodal = config.get(KEY), multimodal_of(config)
    if multimodal and model_type(config) in multimodal.text_ties:
        stated = stated or text_config(config).get(KEY, stated)
    if stated is not None:
        return bool(stated)
    family = family_of(config)
    if family is None or text_config(config) is not config:
        return True
    return bool(family.defaults.get(KEY, False))


def is_head(module: str) -> bool:
    return module.rpartition(".")[2] in _HEADS and not _INSIDE.search(module)


def is_embedding(module: str) -> bool:
    """Whether it is the embedding of the tokens."""
    return module.rpartition(".")[2] in _EMBEDDINGS and not _INSIDE.search(module)


def untied(config: Config, quantized: Iterable[str], dense: Iterable[str]) -> Mapping[str, Any]:
    """config.json for an output: where it ties a head that is stored to an embedding, and one of
    them is quantized, it says that they are two.

    quantized, dense: modules of the output
    """
    quantized = list(quantized)
    heads = any(map(is_head, [*quantized, *dense]))
    parts = [module for module in quantized if is_head(module) or is_embedding(module)]
    if not config or not heads or not parts or not ties(config):
        return config
    said = {**config, KEY: False}
    text = config.get("text_config")
    return {**said, "text_config": {**text, KEY: False}} if isinstance(text, Mapping) else said
