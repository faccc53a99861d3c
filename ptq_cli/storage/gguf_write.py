"""GGUF files, written (storage/gguf_file.py states the layout): one, or several of a bounded size.

Key-values are given as they stand in a file, so that those of another file are copied as they are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.errors import FileError
from ptq_cli.storage.files import named, read_into
from ptq_cli.storage.gguf_file import ALIGNMENT, NUMBERS, GgufTensor, aligned

_VERSION = 3
_UINT8, _STRING, _ARRAY = 0, 8, 9
# The type of a value → its kind in the file and struct's letter; of whole numbers in lists I32.
_KINDS = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
_KINDS_IN_LISTS = {**_KINDS, int: (5, "i")}
_PIECE = 16 << 20  # bytes that are copied at once

# A tensor's values, those of its parts one after the other, or where it lies in another file.
Data = Array | Sequence[Array] | GgufTensor


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written. spec: its name in the file, ggml's type and its shape"""

    spec: TensorSpec
    nbytes: int


def encoded(value: Any) -> bytes:
    """Kind and value: `int` as U32, `float` as F32, `bool`, `str`, `bytes` as a list of U8, or a
    list of the others (I32).

    Raises:
        FileError: a number that does not fit.
    """
    try:
        if isinstance(value, str):
            return struct.pack("<I", _STRING) + _string(value)
        if isinstance(value, list):
            return struct.pack("<I", _ARRAY) + _list(value)
        if isinstance(value, bytes):
            return struct.pack("<IIQ", _ARRAY, _UINT8, len(value)) + value
        kind, letter = _KINDS[type(value)]
        return struct.pack(f"<I{letter}", kind, value)
    except struct.error as error:
        raise FileError(f"a value does not fit GGUF: {error}") from error


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _list(values: list[Any]) -> bytes:
    if values and isinstance(values[0], str):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values))
    kind, letter = _KINDS_IN_LISTS[type(values[0]) if values else int]
    return struct.pack(f"<IQ{len(values)}{letter}", kind, len(values), *values)


def encoded_keys(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """`encoded` of each key's value; empty lists are left out, as llama.cpp's own tools do."""
    return {key: encoded(value) for key, value in metadata.items() if value != []}


def write_gguf(
    path: Path,
    keys: Mapping[str, bytes],
    tensors: Sequence[Outgoing],
    data: Iterable[Data],
    alignment: int = ALIGNMENT,
    max_shard: int | None = None,
) -> list[Path]:
    """Write a GGUF file, or several (NAME-00001-of-00002.gguf …) where it would have more than
    `max_shard` bytes of tensors. What was written is on the disk at the end.

    keys: key → `encoded` value
    data: the tensors' data in their order, taken one by one
    alignment: what `general.alignment` among the keys says, where it stands there

    Raises:
        FileError: the file system said no.
    """
    shards = _cut(tensors, max_shard)
    paths = _shard_paths(path, len(shards))
    items = iter(data)
    for number, (own, shard) in enumerate(zip(paths, shards, strict=True)):
        mine = _keys_of(number, len(shards), keys, len(tensors))
        with named(own), open(own, "wb") as file:
            file.write(_header(mine, shard, alignment))
            for tensor in shard:
                _put(file, next(items), tensor, alignment)
            file.flush()
            os.fsync(file.fileno())
    return paths


def gguf_size(
    keys: Mapping[str, bytes],
    tensors: Sequence[Outgoing],
    alignment: int,
    max_shard: int | None = None,
) -> int:
    """Bytes of the files that `write_gguf` would write."""
    size = sum(aligned(tensor.nbytes, alignment) for tensor in tensors)
    shards = _cut(tensors, max_shard)
    for number, shard in enumerate(shards):
        own = _keys_of(number, len(shards), keys, len(tensors))
        size += len(_header(own, shard, alignment))
    return size


def _keys_of(
    number: int, count: int, keys: Mapping[str, bytes], n_tensors: int
) -> dict[str, bytes]:
    """Of one file of so many."""
    own = dict(keys) if number == 0 else {}
    if number and "general.alignment" in keys:
        own["general.alignment"] = keys["general.alignment"]
    return own | (_split_keys(number, count, n_tensors) if count > 1 else {})


def _cut(tensors: Sequence[Outgoing], max_shard: int | None) -> list[list[Outgoing]]:
    """Tensors in order, in shards of at most `max_shard` bytes; a larger one is alone in its."""
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if max_shard is not None and shards[-1] and size + tensor.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _shard_paths(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    names = (f"{path.stem}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count))
    return [path.with_name(name) for name in names]


def _split_keys(number: int, count: int, n_tensors: int) -> dict[str, bytes]:
    """Of the kinds that llama.cpp reads them in: U16, U16, I32."""
    return {
        "split.no": struct.pack("<IH", 2, number),
        "split.count": struct.pack("<IH", 2, count),
        "split.tensors.count": struct.pack("<Ii", 5, n_tensors),
    }


def _header(keys: Mapping[str, bytes], tensors: Sequence[Outgoing], alignment: int) -> bytes:
    """All that stands before the data, filled up to the alignment."""
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(keys))]
    parts += [_string(key) + value for key, value in keys.items()]
    offset = 0
    for tensor in tensors:
        shape = tensor.spec.shape[::-1]
        parts.append(_string(tensor.spec.name))
        parts.append(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", NUMBERS[tensor.spec.dtype], offset))
        offset = aligned(offset + tensor.nbytes, alignment)
    header = b"".join(parts)
    return header.ljust(aligned(len(header), alignment), b"\0")


def _put(file: BinaryIO, data: Data, tensor: Outgoing, alignment: int) -> None:
    """Write a tensor's data, and zeros up to the alignment."""
    written = 0
    for piece in pieces_of(data):
        file.write(piece.data)
        written += len(piece)
    if written != tensor.nbytes:
        raise FileError(f"{tensor.spec.name}: {written} bytes, but {tensor.nbytes} are planned")
    file.write(bytes(aligned(written, alignment) - written))


def pieces_of(data: Data) -> Iterator[Array]:
    """The bytes of a tensor, uint8, a bounded number at a time where they lie in a file."""
    if not isinstance(data, GgufTensor):
        for values in [data] if isinstance(data, np.ndarray) else data:
            yield np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return
    for start in range(0, data.nbytes, _PIECE):
        piece = np.empty(min(_PIECE, data.nbytes - start), np.uint8)
        read_into(data.file, data.offset + start, piece)
        yield piece
