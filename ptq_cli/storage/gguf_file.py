"""GGUF files (versions 2 and 3, little endian), read; storage/gguf_write.py writes them.

    "GGUF", U32 version, U64 number of tensors, U64 number of key-values
    key-values:  string key, U32 kind, value
    tensors:     string name, U32 rank, U64 sizes (innermost first), U32 ggml type, U64 offset
    data, every tensor at a multiple of the alignment (32), zeros between

A string is its U64 length and UTF-8. Reading believes nothing: lengths, kinds, types, sizes,
offsets, no name twice, no holes, and the file's own size are all checked.

A model may lie in several files, NAME-00001-of-00003.gguf. Each says which it is: `split.no` (from
0), `split.count`, `split.tensors.count` (of all); all other key-values stand in the first.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ptq_cli.core.names import fold_names
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.storage.files import listing, named, read_into, regular_file

# ggml's types: number -> name, columns in a block, bytes of a block
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136), 28: ("F64", 1, 8),
    30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
ALIGNMENT = 32
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
SCALES = (".scale", ".input_scale")  # endings of what NVFP4's tensors, and inputs, may have beside

_SCALARS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}  # kind -> struct's letter
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file. `spec.dtype` is ggml's name of the type, `spec.shape` is
    [out_features, in_features]; `offset` counts from the start of `file`."""

    spec: TensorSpec
    offset: int
    nbytes: int
    file: Path


@dataclass(frozen=True)
class GgufHeader:
    """All that a file says before its data; of a model in several files, of all of them.

    places: key → first byte and bytes of its kind and value in the (first) file
    """

    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    files: tuple[Path, ...]
    places: Mapping[str, tuple[int, int]]

    def encoded(self, key: str) -> bytes:
        """Kind and value of a key, as they stand in the file."""
        offset, size = self.places[key]
        data = np.empty(size, np.uint8)
        read_into(self.files[0], offset, data)
        return data.tobytes()


class Cursor:
    """Reads a file from its start; every read is checked against what is left of it."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size, self.at = file, path, size, 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size - self.at else b""
        if len(data) != count:
            raise InputError(f"{self.path}: cut short, or a length in its header is wrong")
        self.at += count
        return data

    def skip(self, count: int) -> None:
        """Pass over bytes that must be there."""
        if count > self.size - self.at:
            self.take(count)
        self.file.seek(count, 1)
        self.at += count

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def count(self) -> int:
        value = int(self.number("Q"))
        if value > min(_MAX_COUNT, self.size):
            raise InputError(f"{self.path}: a count of {value} in its header")
        return value

    def string(self) -> str:
        length = int(self.number("Q"))
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: a string in its header is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth == 0:
            inner, count = int(self.number("I")), self.count()
            if inner in _SCALARS:
                letters = f"<{count}{_SCALARS[inner]}"
                return list(struct.unpack(letters, self.take(struct.calcsize(letters))))
            return [self.value(inner, 1) for _ in range(count)]
        raise InputError(f"{self.path}: a value of kind {kind} in its header")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file, and of those that follow it where the model lies in
    several. Raises InputError."""
    first = _read_header(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count < 2**16:
        raise InputError(f"{path}: split.count is {str(count)[:40]}")
    return first if count < 2 else _with_shards(path, first, count)


def _with_shards(path: Path, first: GgufHeader, count: int) -> GgufHeader:
    """The headers of all shards as one."""
    name = _SHARD.fullmatch(path.name)
    if first.metadata.get("split.no") != 0 or name is None or int(name[2]) != 1:
        raise InputError(
            f"{path}: one file of {count} that hold a model",
            hint=f"name the first, NAME-00001-of-{count:05d}.gguf, or their folder",
        )
    names = [f"{name[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    present = set(listing(path.parent)) | {path.name}
    missing = [own for own in names if own not in present]
    if missing or path.name != names[0]:
        lost = missing or names[:1]
        raise InputError(f"{path}: {len(lost)} of {count} shards are missing: {fold_names(lost)}")
    files = tuple(path.parent / own for own in names)
    headers = [first, *(_read_header(file) for file in files[1:])]
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        stated = header.metadata.get("split.no"), header.metadata.get("split.count")
        if stated != (number, count):
            said = f"{stated[0]!s:.40} of {stated[1]!s:.40}"
            raise InputError(f"{file}: its header says that it is shard {said}, from 0")
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    _refuse_twice(path, tensors)
    stated_total = first.metadata.get("split.tensors.count", len(tensors))
    if stated_total != len(tensors):
        said = f"split.tensors.count is {stated_total!s:.40}"
        raise InputError(f"{path}: {said}, but the shards hold {len(tensors)} tensors")
    return replace(first, tensors=tensors, files=files)


def first_shard(names: Sequence[str]) -> str | None:
    """The first file of a model in several, where these are its files and no others."""
    found = [match for name in names if (match := _SHARD.fullmatch(name))]
    series = {(match[1], match[3]) for match in found}
    if len(found) < len(names) or len(series) != 1:
        return None
    return min(names)


def _read_header(path: Path) -> GgufHeader:
    """Read and check the header of one file."""
    size = regular_file(path)
    with named(path), open(path, "rb") as file:
        cursor = Cursor(file, path, size)
        if size < 24 or cursor.take(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
        version = cursor.number("I")
        if version in (2 << 24, 3 << 24):
            raise InputError(
                f"{path}: big endian", hint="convert it: gguf-convert-endian FILE little"
            )
        if version not in (2, 3):  # of one layout
            raise InputError(f"{path}: GGUF version {version} is not understood, only 2 and 3")
        n_tensors, n_values = cursor.count(), cursor.count()
        metadata: dict[str, Any] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(n_values):
            key, start = cursor.string(), cursor.at
            if key in metadata:
                raise InputError(f"{path}: key {key[:80]!r} stands twice")
            metadata[key] = cursor.value(int(cursor.number("I")))
            places[key] = (start, cursor.at - start)
        found = [_tensor_info(cursor) for _ in range(n_tensors)]
        placed = _placed(path, metadata, found, cursor.at, size)
        return GgufHeader(metadata, placed, (path,), places)


def _tensor_info(cursor: Cursor) -> GgufTensor:
    """The next tensor; its offset counts from the start of the data."""
    name, rank = cursor.string(), int(cursor.number("I"))
    where = f"{cursor.path}: tensor {name[:80]!r}"
    if not 1 <= rank <= 4:
        raise InputError(f"{where} has {rank} axes")
    shape = tuple(int(cursor.number("Q")) for _ in range(rank))[::-1]
    number, offset = int(cursor.number("I")), int(cursor.number("Q"))
    if number not in TYPES:
        raise InputError(f"{where} has ggml's type {number}, which is not understood")
    kind, block, width = TYPES[number]
    if not all(0 < size < 2**40 for size in shape) or shape[-1] % block:
        raise InputError(f"{where} of type {kind} has shape {list(shape)}")
    return GgufTensor(
        TensorSpec(name, kind, shape), offset, prod(shape) // block * width, cursor.path
    )


def _placed(
    path: Path,
    metadata: Mapping[str, Any],
    found: Sequence[GgufTensor],
    end_of_header: int,
    size: int,
) -> tuple[GgufTensor, ...]:
    """Tensors with their places in the file: one after the other, no name twice, no holes."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise InputError(f"{path}: general.alignment is {str(alignment)[:40]}, no power of two")
    _refuse_twice(path, found)
    start = aligned(end_of_header, alignment)
    end = 0
    for tensor in found:
        if tensor.offset != aligned(end, alignment):
            raise InputError(
                f"{path}: tensor {tensor.spec.name!r} starts at byte {tensor.offset} of the data,"
                f" the one before it ends at {end}"
            )
        end = tensor.offset + tensor.nbytes
    if not start + end <= size <= aligned(start + end, alignment):
        what = "cut short" if size < start + end else "followed by other bytes"
        raise InputError(
            f"{path}: {what}: the header asks for {start + end} bytes, the file has {size}"
        )
    return tuple(replace(tensor, offset=start + tensor.offset) for tensor in found)


def _refuse_twice(path: Path, tensors: Sequence[GgufTensor]) -> None:
    if len({tensor.spec.name for tensor in tensors}) < len(tensors):
        raise InputError(f"{path}: a tensor's name stands twice")


def aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
