"""Token ids to run a model on: from a `.npy` file, from text and the model's tokenizer, or from
conversations and the model's chat template, too.

Ids are `[n, length]`, or one dimension that is cut into sequences of `--seq-len`; a mask of the
same shape is 0 or false at padding. What is not a whole sequence at the end is left out. Sequences
of text begin as the tokenizer begins a text: with BOS, or with nothing. Conversations are packed
into rows of `--seq-len`, several to a row, and none sees another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError
from ptq_cli.models.family import image_tokens, text_config
from ptq_cli.numerics.weak_tokens import repeated_sequences, weak_tokens
from ptq_cli.storage.chat import chat_sequences, pack_rows
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import named, read_into, regular_file
from ptq_cli.storage.npy import open_npy
from ptq_cli.storage.tokenizer import open_tokenizer

SEQ_LEN = 512
# Of a text, to calibrate on: twice the tokens take twice as long, and on small models lower the KL
# divergence by another tenth (docs/activations.md).
CALIBRATION_SEQUENCES = 128


@dataclass(frozen=True)
class TokenSettings:
    """Which tokens a command runs the model on.

    tokens: a `.npy` file, or text: a text file, or chat: conversations, JSON lines
    seq_len: length of the sequences that one dimension, or text, is cut into, and of the rows that
        conversations are packed into
    nsamples: sequences (of conversations: rows) to take, drawn with `seed`; None: all, in their
        order (or of a text and of conversations as many as the command needs)
    mask: a `.npy` file, 0 or false at padding
    """

    tokens: Path | None = None
    text: Path | None = None
    chat: Path | None = None
    seq_len: int | None = None
    nsamples: int | None = None
    seed: int = 0
    mask: Path | None = None

    @property
    def inputs(self) -> dict[str, Path]:
        """What was given of `tokens`, `text` and `chat`, of which one may be."""
        paths = {"tokens": self.tokens, "text": self.text, "chat": self.chat}
        return {name: path for name, path in paths.items() if path is not None}

    @property
    def given(self) -> bool:
        return bool(self.inputs)

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.inputs.values(), *([] if self.mask is None else [self.mask]))


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids.

    ids: int64 [n, length]; mask: bool [n, length], false at padding
    begins: bool [n, length], true at the first token of each of the sequences that are packed into
        a row; None: each row is one sequence
    weak: why errors measured on them say little; these stand among `warnings`, too
    """

    name: str
    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    weak: tuple[str, ...] = ()
    begins: NDArray[np.bool_] | None = None

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.ids.shape).encode())
        digest.update(np.where(self.mask, self.ids, -1).tobytes())
        if self.begins is not None:
            digest.update(self.begins.tobytes())
        return digest.hexdigest()

    def sequences(self, rows: slice = slice(None)) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids and mask of some rows, each sequence in a row of its own: [n_sequences, length]."""
        ids, mask = self.ids[rows], self.mask[rows]
        return (ids, mask) if self.begins is None else _unpack(ids, mask, self.begins[rows])


def read_tokens(
    settings: TokenSettings, checkpoint: Checkpoint, at_most: int | None = None
) -> Tokens:
    """The sequences that `settings` name.

    at_most: sequences to take of a text, rows of conversations, where `settings` say nothing

    Raises:
        InputError: not integers, a shape that does not fit, ids outside the vocabulary, text
            without a tokenizer, conversations without a chat template or that it fails on.
    """
    if len(settings.inputs) > 1:
        first, second, *_ = settings.inputs
        raise InputError(f"--{first} and --{second} exclude each other")
    [(kind, path)] = settings.inputs.items()
    if settings.mask is not None and kind == "chat":
        raise InputError("--mask goes with --tokens: --chat makes a mask of its own")
    count = at_most if settings.nsamples is None and kind != "tokens" else settings.nsamples
    ids, mask, begins = _rows(kind, path, settings, checkpoint, count)
    if settings.nsamples is None and count is not None:
        count = min(count, len(ids))
    what = "sequences" if begins is None else "rows"
    chosen = _draw(f"{path}: {len(ids)} {what}", len(ids), count, settings.seed)
    ids, mask = ids[chosen], mask[chosen]
    begins = None if begins is None else begins[chosen]
    _check_ids(path, ids[mask], checkpoint)
    found = Tokens(str(path), np.where(mask, ids, 0), mask, files=settings.files, begins=begins)
    sequences = found.sequences()
    weak, repeated = weak_tokens(*sequences), repeated_sequences(*sequences)
    said = f"{repeated} of {len(sequences[0])} sequences repeat an earlier one"
    odd = dict.fromkeys([*weak, said] if repeated else weak)
    return replace(found, warnings=tuple(f"{path}: {words}" for words in odd), weak=weak)


def _rows(
    kind: str, path: Path, settings: TokenSettings, checkpoint: Checkpoint, count: int | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Ids, mask and where packed sequences begin, of all there are, or, of conversations, of enough
    for `count` rows."""
    length = settings.seq_len or SEQ_LEN
    if kind == "chat":
        wanted = None if count is None else count * length
        return pack_rows(chat_sequences(path, checkpoint, length, wanted, settings.seed), length)
    if kind == "text":
        ids = _text_file(path, length, checkpoint)
    else:
        ids = _token_file(path, settings.seq_len)
    if settings.mask is None:
        return ids, np.ones(ids.shape, np.bool_), None
    return ids, _mask_file(settings.mask, ids.shape), None


def _unpack(
    ids: NDArray[np.int64], mask: NDArray[np.bool_], begins: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows of packed sequences, [n, length] each, as `Tokens.sequences` has them."""
    starts = np.flatnonzero(begins[mask])
    lengths = np.diff(starts, append=mask.sum())
    shown = np.arange(lengths.max()) < lengths[:, None]
    apart = np.zeros(shown.shape, np.int64)
    apart[shown] = ids[mask]
    return apart, shown


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


def _draw(said: str, n: int, count: int | None, seed: int) -> NDArray[np.int64]:
    """`count` of `n` rows in their order, drawn without replacement where there are more.

    said: what there is, in words"""
    if count is None or count == n:
        return np.arange(n)
    if count > n:
        raise InputError(f"{said}, fewer than --nsamples {count}")
    return np.sort(np.random.default_rng(seed).choice(n, count, replace=False))


def _check_ids(path: Path, ids: NDArray[np.int64], checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    for token, key in image_tokens(config).items():
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


def _text_file(path: Path, length: int, checkpoint: Checkpoint) -> NDArray[np.int64]:
    """A text file as whole sequences of the ids that the model's tokenizer.json makes of it."""
    tokenizer = open_tokenizer(checkpoint, "--text")
    regular_file(path)
    with named(path):
        content = path.read_bytes()
    try:
        ids = tokenizer.encode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    sequences = tokenizer.sequences(ids, length)
    whole = [sequence for sequence in sequences if len(sequence) == length]
    if not whole:
        raise InputError(f"{path}: {len(ids)} tokens, fewer than a sequence of {length}")
    return np.array(whole, np.int64)
