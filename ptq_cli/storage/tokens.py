"""Token ids to run a model on: from a `.npy` file, or from text and the model's tokenizer.json.

Ids are `[n, length]`, or one dimension that is cut into sequences of `--seq-len`; a mask of the
same shape is 0 or false at padding. What is not a whole sequence at the end is left out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError, import_extra
from ptq_cli.models.families import multimodal_of
from ptq_cli.models.family import image_tokens, text_config
from ptq_cli.numerics.weak_tokens import repeated_sequences, weak_tokens
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import listing, named, read_into, regular_file
from ptq_cli.storage.npy import open_npy

SEQ_LEN = 512
# Of a text, to calibrate on: twice the tokens take twice as long, and on small models lower the KL
# divergence by another tenth (docs/activations.md).
CALIBRATION_SEQUENCES = 128


@dataclass(frozen=True)
class TokenSettings:
    """Which tokens a command runs the model on.

    tokens: a `.npy` file, or text: a text file
    seq_len: length of the sequences that one dimension, or text, is cut into
    nsamples: sequences to take, drawn with `seed`; None: all, in their order (or of a text as many
        as the command needs)
    mask: a `.npy` file, 0 or false at padding
    """

    tokens: Path | None = None
    text: Path | None = None
    seq_len: int | None = None
    nsamples: int | None = None
    seed: int = 0
    mask: Path | None = None

    @property
    def given(self) -> bool:
        return self.tokens is not None or self.text is not None

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.tokens, self.text, self.mask) if path is not None)


@dataclass(frozen=True)
class Tokens:
    """Sequences of token ids.

    ids: int64 [n, length]; mask: bool [n, length], false at padding
    weak: why errors measured on them say little; these stand among `warnings`, too
    """

    name: str
    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    weak: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.ids.shape).encode())
        digest.update(np.where(self.mask, self.ids, -1).tobytes())
        return digest.hexdigest()


def read_tokens(
    settings: TokenSettings, checkpoint: Checkpoint, at_most: int | None = None
) -> Tokens:
    """The sequences that `settings` name.

    at_most: sequences to take of a text where `settings` say nothing

    Raises:
        InputError: not integers, a shape that does not fit, ids outside the vocabulary, text
            without a tokenizer.
    """
    if settings.tokens is not None and settings.text is not None:
        raise InputError("--tokens and --text exclude each other")
    path = settings.tokens or settings.text
    assert path is not None
    if settings.tokens is None:
        ids = _cut(path, _encode(path, checkpoint), settings.seq_len or SEQ_LEN)
    else:
        ids = _token_file(path, settings.seq_len)
    mask = np.ones(ids.shape, np.bool_)
    if settings.mask is not None:
        mask = _mask_file(settings.mask, ids.shape)
    count = settings.nsamples
    if count is None and settings.text is not None and at_most is not None:
        count = min(at_most, len(ids))
    ids, mask = _draw(path, ids, mask, count, settings.seed)
    _check_ids(path, ids[mask], checkpoint)
    weak, repeated = weak_tokens(ids, mask), repeated_sequences(ids, mask)
    said = f"{repeated} of {len(ids)} sequences repeat an earlier one"
    odd = dict.fromkeys([*weak, said] if repeated else weak)
    warnings = tuple(f"{path}: {words}" for words in odd)
    return Tokens(str(path), np.where(mask, ids, 0), mask, warnings, settings.files, weak)


def _integers(path: Path) -> Array:
    npy = open_npy(path)
    if npy.dtype.kind not in "iub":
        raise InputError(f"{path}: {npy.dtype.name} {list(npy.shape)}, not integers")
    values = np.empty(npy.size // npy.dtype.itemsize, npy.dtype)
    read_into(path, npy.offset, values.view(np.uint8))
    return values.reshape(npy.shape, order="F" if npy.fortran else "C")


def _token_file(path: Path, seq_len: int | None) -> NDArray[np.int64]:
    ids = _integers(path)
    if ids.ndim == 1:
        if seq_len is None:
            raise InputError(f"{path}: {list(ids.shape)}, one dimension", hint="--seq-len LENGTH")
        return _cut(path, ids, seq_len)
    if ids.ndim != 2 or ids.size == 0:
        raise InputError(f"{path}: shape {list(ids.shape)}; tokens are [n, length]")
    if seq_len is not None and seq_len != ids.shape[1]:
        if seq_len > ids.shape[1]:
            raise InputError(f"{path}: {list(ids.shape)} has no sequence of {seq_len} tokens")
        ids = ids[:, :seq_len]
    return ids.astype(np.int64)


def _cut(path: Path, ids: Array, seq_len: int) -> NDArray[np.int64]:
    count = len(ids) // seq_len
    if count == 0:
        raise InputError(f"{path}: {len(ids)} tokens, fewer than a sequence of {seq_len}")
    return ids[: count * seq_len].reshape(count, seq_len).astype(np.int64)


def _mask_file(path: Path, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = _integers(path)
    if mask.shape != shape:
        raise InputError(f"{path}: {list(mask.shape)}, but the tokens are {list(shape)}")
    if not mask.any():
        raise InputError(f"{path}: hides every token")
    return mask.astype(np.bool_)


def _draw(
    path: Path, ids: NDArray[np.int64], mask: NDArray[np.bool_], count: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`count` sequences in their order, drawn without replacement where there are more."""
    if count is None or count == len(ids):
        return ids, mask
    if count > len(ids):
        raise InputError(f"{path}: {len(ids)} sequences, fewer than --nsamples {count}")
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(len(ids), count, replace=False))
    return ids[chosen], mask[chosen]


def _check_ids(path: Path, ids: NDArray[np.int64], checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    images = image_tokens(config) if multimodal_of(config) is not None else {}
    for token, key in images.items():
        if count := int((ids == token).sum()):
            raise InputError(
                f"{path}: {count} tokens are {token}, which stands for what is no text"
                f" (config.json's {key})",
                hint="leave such sequences out, or hide these tokens with --mask",
            )
    size = text_config(config).get("vocab_size")
    if not isinstance(size, int):
        return
    for worst in (int(ids.min()), int(ids.max())):
        if not 0 <= worst < size:
            raise InputError(
                f"{path}: token {worst}, but the model has {size}",
                hint="tokenize with the model's own tokenizer",
            )


def _encode(path: Path, checkpoint: Checkpoint) -> Array:
    """A text file as the ids that the model's tokenizer.json makes of it."""
    tokenizers = import_extra("tokenizers", "--text", "text")
    own = checkpoint.documents.get("tokenizer.json")
    if own is None and "tokenizer.json" not in listing(checkpoint.folder):
        raise InputError(f"{checkpoint.folder}: no tokenizer.json", hint="--tokens FILE.npy")
    regular_file(path)
    with named(path):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    tokenizer_path = checkpoint.folder / "tokenizer.json"
    try:
        made = tokenizers.Tokenizer
        tokenizer = made.from_str(json.dumps(own)) if own else made.from_file(str(tokenizer_path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{tokenizer_path}: {error}") from None
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
