"""The model's own tokenizer, by the library that reads tokenizer.json (extra `text`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ptq_cli.errors import InputError, import_extra
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import listing


@dataclass(frozen=True)
class Tokenizer:
    """start: the ids that the tokenizer puts before a text: BOS, or nothing"""

    own: Any
    start: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text as it stands, special tokens included that are written in it.

        Raises:
            InputError: half of a surrogate pair, which no text holds.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise InputError(f"{half} stands alone, which is no character") from None
        ids: list[int] = self.own.encode(text, add_special_tokens=False).ids
        return ids

    def sequences(self, ids: Sequence[int], length: int) -> list[list[int]]:
        """Ids cut into sequences of at most `length`, each behind the tokenizer's start, which a
        text that begins with it already does not get twice."""
        start = list(self.start)
        if length <= len(start):
            raise InputError(f"--seq-len {length} leaves no room behind {len(start)} tokens (BOS)")
        first = len(start) if list(ids[: len(start)]) == start else 0
        step = length - len(start)
        return [[*start, *ids[at : at + step]] for at in range(first, len(ids), step)]


def open_tokenizer(checkpoint: Checkpoint, option: str) -> Tokenizer:
    """The tokenizer of the checkpoint's tokenizer.json, for what `option` names.

    Raises:
        InputError: the library is missing, no tokenizer.json, or one that it does not take.
    """
    tokenizers = import_extra("tokenizers", option, "text")
    document = checkpoint.documents.get("tokenizer.json")
    path = checkpoint.folder / "tokenizer.json"
    if document is None and path.name not in listing(checkpoint.folder):
        raise InputError(f"{checkpoint.folder}: no tokenizer.json", hint="--tokens FILE.npy")
    try:
        made = tokenizers.Tokenizer
        own = made.from_str(json.dumps(document)) if document else made.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: {error}") from None
    own.no_truncation()  # files may come with the lengths that they were trained with
    own.no_padding()
    probe = own.encode("a", add_special_tokens=True)
    before = list(takewhile(lambda added: added, probe.special_tokens_mask))
    return Tokenizer(own, tuple(probe.ids[: len(before)]))
