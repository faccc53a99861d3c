"""What cannot be asked of a head that is tied to the embedding: one tensor is both."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.ties import is_embedding, is_head, ties
from ptq_cli.storage.checkpoint import Checkpoint

_HEADS = tuple(dict.fromkeys(f"{family.names.head}.weight" for family in FAMILIES))


def refuse_missing_head(checkpoint: Checkpoint, include: Sequence[str]) -> None:
    """Refuse to include nothing but a head that has no tensor of its own.

    Raises:
        InputError: it names the embedding, which is the head.
    """
    modules = _modules(checkpoint)
    embedding = next(filter(is_embedding, modules), None)
    if embedding is None or any(map(is_head, modules)) or not ties(checkpoint.config):
        return
    for word in include:
        try:
            named = [head for head in _HEADS if re.search(word, head)]
            others = any(re.search(word, name) for name in checkpoint.tensors)
        except (re.error, OverflowError, RecursionError):
            continue  # who compiles it says so
        if named and not others:
            raise InputError(
                f"--include {word!r}: {checkpoint.path} has no {named[0]}, its head is tied to"
                f" {embedding}.weight",
                hint=f"leave it out, or --include {embedding} (formats ptq, mlx, gguf) for both",
            )


def refuse_lone_head(checkpoint: Checkpoint, chosen: Sequence[str]) -> None:
    """Refuse to quantize a head that is stored for both: the embedding would be lost.

    Raises:
        InputError: it names the head.
    """
    if any(map(is_embedding, _modules(checkpoint))) or not ties(checkpoint.config):
        return
    for name in chosen:
        if checkpoint.config and is_head(name.removesuffix(".weight")):
            raise InputError(
                f"{checkpoint.path}: tensor {name!r} is the embedding too (tie_word_embeddings),"
                " and only the head of the two is stored",
                hint=f"leave {name.removesuffix('.weight')} out of --include",
            )


def _modules(checkpoint: Checkpoint) -> list[str]:
    return [name.removesuffix(".weight") for name in checkpoint.tensors]
