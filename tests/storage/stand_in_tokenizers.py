"""What stands in for the library `tokenizers`: a letter is a token, and so is a special token that
is written out. tests/interop has the library itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

SPECIAL = ("<s>", "</s>", "<u>", "<a>")
LETTERS = 36  # a vocabulary of 40, with the special tokens


def document(*start: str) -> str:
    """A tokenizer.json that puts `start` before a text."""
    return json.dumps({"start": start})


class Tokenizer:
    def __init__(self, text: str) -> None:
        self.start = [SPECIAL.index(token) for token in json.loads(text)["start"]]

    @classmethod
    def from_file(cls, path: str) -> Tokenizer:
        return cls(Path(path).read_text())

    @classmethod
    def from_str(cls, text: str) -> Tokenizer:
        return cls(text)

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        before = self.start if add_special_tokens else []
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
            if part in SPECIAL:
                ids.append(SPECIAL.index(part))
            else:
                ids += [len(SPECIAL) + ord(letter) % LETTERS for letter in part]
        return SimpleNamespace(
            ids=[*before, *ids], special_tokens_mask=[1] * len(before) + [0] * len(ids)
        )
