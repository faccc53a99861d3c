"""Regular expressions of users, which name tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ptq_cli.errors import InputError
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor


def matches(pattern: re.Pattern[str], tensor: StoredTensor, names: Mapping[str, str]) -> bool:
    """Whether a pattern names it, the tensor of all experts that it is stored in, or what it is
    called in GGUF."""
    name, whole = tensor.spec.name, tensor.part_of
    words = [name, names.get(name), whole and whole.spec.name]
    return any(pattern.search(word) for word in words if word)


def compiled(where: str, word: str) -> re.Pattern[str]:
    """A user's regular expression, which stands in `where`. Raises InputError where it is none."""
    try:
        return re.compile(word)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: not a regular expression: {error}") from None


def pattern_of(
    where: str, word: str, checkpoint: Checkpoint, names: Mapping[str, str]
) -> re.Pattern[str]:
    """A regular expression that names a tensor, and stands in `where`. Raises InputError."""
    pattern = compiled(where, word)
    if not any(matches(pattern, tensor, names) for tensor in checkpoint.tensors.values()):
        raise InputError(
            f"{where} matches no tensor of {checkpoint.path}",
            hint=f"names look like {next(iter(checkpoint.tensors), 'nothing')!r}",
        )
    return pattern


def patterns(
    setting: str, words: Sequence[str], checkpoint: Checkpoint, names: Mapping[str, str]
) -> list[re.Pattern[str]]:
    """Regular expressions, each of which names a tensor. Raises InputError."""
    return [pattern_of(f"{setting} {word!r}", word, checkpoint, names) for word in words]
