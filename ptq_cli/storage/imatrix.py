"""Importance matrices of llama.cpp: for each linear the mean square of each of its inputs.

As GGUF (`general.type` "imatrix"), for each tensor of a model, by its name there:

    NAME.in_sum2    F32 [n, in_features], sums of squares over the tokens; n experts, or 1
    NAME.counts     F32 [n, 1], tokens

and the keys imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size. The older form, little
endian, has no magic: I32 number of entries; for each I32 length and name, I32 calls, I32 number of
values, F32 values (mean squares times the calls); then what is not needed here.
"""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.storage.files import named, read_into, regular_file, replacing
from ptq_cli.storage.gguf_file import Cursor, GgufTensor, read_gguf_header
from ptq_cli.storage.gguf_write import Outgoing, encoded, encoded_keys, write_gguf

CHUNK = 512  # tokens of a call, unless asked otherwise
_SUMS, _COUNTS = ".in_sum2", ".counts"
_NOT_ONE = "not an importance matrix"
_LARGEST = 1e30  # of 10^9 tokens in float16 it is below 10^19; errors are summed in float32


@dataclass(frozen=True)
class Importance:
    """What is said of one tensor; means are `sums / counts`.

    file, offset, n_values: where the sums lie, F32 [n_values]
    counts: of each expert, or one for all; per_count: tokens that one stands for
    """

    file: Path
    offset: int
    n_values: int
    counts: tuple[float, ...]
    per_count: int = 1

    def sums(self) -> NDArray[np.float32]:
        """Float32 [n_values]. Raises InputError where they are no sums of squares."""
        values = np.empty(self.n_values, np.float32)
        read_into(self.file, self.offset, values.view(np.uint8))
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise InputError(f"{self.file}: sums of squares that are negative or not finite")
        if values.max(initial=0) > _LARGEST:
            raise InputError(
                f"{self.file}: a sum of squares of {values.max():.3g}, which no inputs have"
            )
        return values


def read_imatrix(path: Path) -> dict[str, Importance]:
    """The entries of a file, by the tensors' names. Raises InputError, FileError."""
    size = regular_file(path)
    start = np.empty(min(size, 4), np.uint8)
    read_into(path, 0, start)
    found = _read_gguf(path) if start.tobytes() == b"GGUF" else _read_old(path, size)
    if not found:
        raise InputError(f"{path}: {_NOT_ONE}: no entries")
    return found


def _read_gguf(path: Path) -> dict[str, Importance]:
    header = read_gguf_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise InputError(f"{path}: {_NOT_ONE}: general.type is not 'imatrix'")
    tensors = {tensor.spec.name: tensor for tensor in header.tensors}
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(_SUMS):
            continue
        own = name.removesuffix(_SUMS)
        counts = tensors.get(own + _COUNTS)
        if counts is None or {tensor.spec.dtype, counts.spec.dtype} != {"F32"}:
            raise InputError(f"{path}: {own}: its counts are missing, or not of type F32")
        n_values, numbers = tensor.nbytes // 4, _counts(own, counts)
        if n_values % len(numbers):
            raise InputError(f"{path}: {own}: {n_values} sums, but {len(numbers)} counts")
        found[own] = Importance(path, tensor.offset, n_values, numbers)
    return found


def _counts(name: str, tensor: GgufTensor) -> tuple[float, ...]:
    values = np.empty(tensor.nbytes // 4, np.float32)
    read_into(tensor.file, tensor.offset, values.view(np.uint8))
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise InputError(f"{tensor.file}: {name}: counts that are negative or not finite")
    return tuple(values.tolist())


def _read_old(path: Path, size: int) -> dict[str, Importance]:
    found: dict[str, Importance] = {}
    with named(path), open(path, "rb") as file:
        cursor = Cursor(file, path, size)
        for _ in range(_positive(cursor, "entries")):
            data = cursor.take(_positive(cursor, "characters"))
            name = data.decode("utf-8", "replace")
            if "\ufffd" in name or name in found:
                raise InputError(f"{path}: {_NOT_ONE}: a name that is no text, or stands twice")
            calls, n_values = _positive(cursor, "calls"), _positive(cursor, "values")
            found[name] = Importance(path, cursor.at, n_values, (float(calls),), CHUNK)
            cursor.skip(4 * n_values)
    return found


def _positive(cursor: Cursor, what: str) -> int:
    number = int(cursor.number("i"))
    if not 0 < number <= cursor.size:
        raise InputError(f"{cursor.path}: {_NOT_ONE}, or damaged: {number} {what}")
    return number


def digest_of_file(path: Path) -> str:
    """SHA-256 of a whole file."""
    with named(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_imatrix(
    path: Path,
    sums: Mapping[str, tuple[NDArray[np.float32], Sequence[int]]],
    datasets: list[str],
    replaced: bool,
) -> None:
    """Write a file as GGUF; the path holds the old bytes or the new.

    sums: by the tensor's name, float32 [n, in_features], and the tokens of each of the n
    datasets: what the inputs came from, in words
    replaced: whether another file may be there

    Raises:
        InputError: another file is there.
    """
    tensors, data = [], []
    for name, (values, counts) in sorted(sums.items()):
        for ending, array in (
            (_SUMS, values.astype(np.float32)),
            (_COUNTS, np.array(counts, np.float32).reshape(-1, 1)),
        ):
            spec = TensorSpec(name + ending, "F32", array.shape)
            tensors.append(Outgoing(spec, array.nbytes))
            data.append(array)
    most = max((max(counts) for _, counts in sums.values()), default=0)
    keys = {"general.type": "imatrix", "imatrix.chunk_count": -(-most // CHUNK)}
    encoded_all = encoded_keys({**keys, "imatrix.chunk_size": CHUNK})
    encoded_all["imatrix.datasets"] = encoded(datasets)
    with replacing(path) as partial:
        write_gguf(partial, encoded_all, tensors, data)
        if path.exists() and not replaced and not filecmp.cmp(partial, path, shallow=False):
            raise InputError(f"{path}: exists already", hint="--force replaces it")
