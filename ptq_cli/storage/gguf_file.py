"""GGUF files (versions 2 and 3, little endian): written with the gguf library, read by this module.

    "GGUF", U32 version, U64 number of tensors, U64 number of key-values
    key-values:  string key, U32 kind, value
    tensors:     string name, U32 rank, U64 sizes (innermost first), U32 ggml type, U64 offset
    data, every tensor at a multiple of the alignment (32), zeros between

A string is its U64 length and UTF-8. Reading believes nothing: lengths, kinds, types, sizes,
offsets, no name twice, no holes, and the file's own size are all checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.errors import FileError, InputError, import_extra
from ptq_cli.storage.files import named, regular_file, sync_file

# ggml's types: number -> name, columns in a block, bytes of a block
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136), 28: ("F64", 1, 8),
    30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
SCALES = (".scale", ".input_scale")  # endings of what NVFP4's tensors, and inputs, may have beside

_SCALARS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}  # kind -> struct's letter
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file. `spec.dtype` is ggml's name of the type, `spec.shape` is
    [out_features, in_features]; `offset` counts from the start of the file."""

    spec: TensorSpec
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


class _Cursor:
    """Reads a file from its start; every read is checked against what is left of it."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size, self.at = file, path, size, 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size - self.at else b""
        if len(data) != count:
            raise InputError(f"{self.path}: cut short, or a length in its header is wrong")
        self.at += count
        return data

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
            return [self.value(inner, 1) for _ in range(count)]
        raise InputError(f"{self.path}: a value of kind {kind} in its header")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file. Raises InputError."""
    size = regular_file(path)
    with named(path), open(path, "rb") as file:
        cursor = _Cursor(file, path, size)
        if size < 24 or cursor.take(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
        version = cursor.number("I")
        if version not in (2, 3):  # of one layout
            raise InputError(f"{path}: GGUF version {version} is not understood, only 2 and 3")
        n_tensors, n_values = cursor.count(), cursor.count()
        metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = cursor.string()
            if key in metadata:
                raise InputError(f"{path}: key {key!r} stands twice")
            metadata[key] = cursor.value(int(cursor.number("I")))
        found = [_tensor_info(cursor) for _ in range(n_tensors)]
        return GgufHeader(metadata, _placed(path, metadata, found, cursor.at, size))


def _tensor_info(cursor: _Cursor) -> GgufTensor:
    """The next tensor; its offset counts from the start of the data."""
    name, rank = cursor.string(), int(cursor.number("I"))
    where = f"{cursor.path}: tensor {name!r}"
    if not 1 <= rank <= 4:
        raise InputError(f"{where} has {rank} axes")
    shape = tuple(int(cursor.number("Q")) for _ in range(rank))[::-1]
    number, offset = int(cursor.number("I")), int(cursor.number("Q"))
    if number not in TYPES:
        raise InputError(f"{where} has ggml's type {number}, which is not understood")
    kind, block, width = TYPES[number]
    if not all(0 < size < 2**40 for size in shape) or shape[-1] % block:
        raise InputError(f"{where} of type {kind} has shape {list(shape)}")
    return GgufTensor(TensorSpec(name, kind, shape), offset, prod(shape) // block * width)


def _placed(
    path: Path,
    metadata: Mapping[str, Any],
    found: Sequence[GgufTensor],
    end_of_header: int,
    size: int,
) -> tuple[GgufTensor, ...]:
    """Tensors with their places in the file: one after the other, no name twice, no holes."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise InputError(f"{path}: general.alignment is {alignment!r}")
    if len({tensor.spec.name for tensor in found}) < len(found):
        raise InputError(f"{path}: a tensor's name stands twice")
    start = _aligned(end_of_header, alignment)
    end = 0
    for tensor in found:
        if tensor.offset != _aligned(end, alignment):
            raise InputError(
                f"{path}: tensor {tensor.spec.name!r} starts at byte {tensor.offset} of the data,"
                f" the one before it ends at {end}"
            )
        end = tensor.offset + tensor.nbytes
    if not start + end <= size <= _aligned(start + end, alignment):
        what = "cut short" if size < start + end else "followed by other bytes"
        raise InputError(
            f"{path}: {what}: the header asks for {start + end} bytes, the file has {size}"
        )
    return tuple(replace(tensor, offset=start + tensor.offset) for tensor in found)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def library() -> Any:
    """The gguf library. Raises InputError that names the extra where it is not installed."""
    return import_extra("gguf", "--format gguf", "gguf")


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    specs: Sequence[tuple[TensorSpec, int]],
    arrays: Iterable[Array],
) -> None:
    """Write a GGUF file.

    metadata: key -> value, of types as in formats/gguf/metadata.py
    specs: each tensor's name, ggml type and shape [out_features, in_features], and its bytes
    arrays: their data in the same order, taken one by one; uint8 for quantized ones
    """
    gguf = library()
    writer = gguf.GGUFWriter(None, architecture)
    kinds = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
             str: writer.add_string, list: writer.add_array}  # fmt: skip
    for key, value in metadata.items():
        if key != "general.architecture":
            kinds[type(value)](key, value)
    for spec, nbytes in specs:
        kind = gguf.GGMLQuantizationType(NUMBERS[spec.dtype])
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    try:
        with named(path):
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for array in arrays:
                writer.write_tensor_data(np.ascontiguousarray(array))
            writer.flush()
    except struct.error as error:
        raise FileError(f"{path}: a value does not fit GGUF: {error}") from error
    finally:
        writer.close()
    sync_file(path)
