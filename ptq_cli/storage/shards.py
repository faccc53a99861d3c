"""Weights files that are laid out before their tensors are there, and filled in any order.

A run copies finished units to their places while others are still being worked on, and the disk
writes them meanwhile; at the end only the headers are missing. safetensors' own writer wants all
tensors at once, so the container is written here; it is read with the library's rules.

The layout (https://github.com/huggingface/safetensors): eight bytes of header length, little
endian; the header, JSON, filled up with spaces; the data, without holes or overlap. Tensors stand
as the library puts them, those of wider dtypes first and then by name, so that each is aligned.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate, repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import DTYPE_BITS, TensorSpec
from ptq_cli.errors import FileError
from ptq_cli.storage.checkpoint import StoredTensor, read_header, read_strided
from ptq_cli.storage.files import named, read_exactly, regular_file
from ptq_cli.storage.tensors import Bytes, as_bytes
from ptq_cli.storage.weights import SUFFIX

Part = tuple[str, Sequence[TensorSpec]]  # a module or tensor, and what is stored of it
Metadata = Callable[[Sequence[str]], Mapping[str, str]]

_PIECE = 1 << 18  # bytes: written and read back in the cache
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


@dataclass(frozen=True)
class Shard:
    """One weights file. tensors: in order, each with its place; start: of their data"""

    path: Path
    modules: Sequence[str]
    tensors: Sequence[StoredTensor]
    start: int

    @property
    def size(self) -> int:
        return self.start + sum(tensor.spec.nbytes for tensor in self.tensors)


class Shards:
    """The weights files of a folder; those that an interrupted run laid out are gone on with.

    parts: in order; a file takes as many as fit `max_shard` bytes, a larger part is alone in one
    longest: the metadata of the parts with these names, as long as it can become
    places: where in these files each tensor belongs
    """

    def __init__(
        self, folder: Path, parts: Sequence[Part], longest: Metadata, max_shard: int
    ) -> None:
        self._shards = lay_out(folder, parts, longest, max_shard)
        self.folder = folder
        self.places = {
            tensor.spec.name: tensor for shard in self._shards for tensor in shard.tensors
        }
        self._there: set[str] = set()
        for shard in self._shards:
            with named(shard.path), open(shard.path, "ab") as file:
                file.truncate(shard.size)

    @property
    def names(self) -> list[str]:
        """The files' names."""
        return [shard.path.name for shard in self._shards]

    @property
    def missing(self) -> set[str]:
        """Tensors that are not there yet."""
        return self.places.keys() - self._there

    def put(self, tensors: Iterable[Bytes | StoredTensor]) -> None:
        """Copy tensors to their places. Raises FileError."""
        for tensor in tensors:
            put_tensor(tensor, self.places[tensor.spec.name])
            self._there.add(tensor.spec.name)

    def take(self, names: Iterable[str]) -> None:
        """Believe that these tensors are in their places."""
        self._there.update(names)

    def finish(self, metadata: Metadata) -> dict[str, str]:
        """Write the headers, wait for the disk, and read the headers back.

        metadata: of the parts with these names
        Returns: the file of each tensor.
        """
        if self.missing:
            raise FileError(f"{self.folder}: {len(self.missing)} tensors were not written")
        for shard in self._shards:
            specs = [tensor.spec for tensor in shard.tensors]
            header = _header(specs, metadata(shard.modules), shard.start)
            if len(header) != shard.start:
                raise FileError(f"{shard.path}: its header does not fit the room left for it")
            with named(shard.path), open(shard.path, "r+b") as file:
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
            if read_header(shard.path).tensors != tuple(shard.tensors):
                raise FileError(f"{shard.path}: does not hold the tensors that were written")
        return {name: place.file.name for name, place in self.places.items()}


def lay_out(folder: Path, parts: Sequence[Part], longest: Metadata, max_shard: int) -> list[Shard]:
    """The files of a folder, as `Shards` has them; nothing is written."""
    cut = _cut(parts, max_shard)
    paths = (folder / name for name in _shard_names(len(cut)))
    return [_laid_out(path, own, longest) for path, own in zip(paths, cut, strict=True)]


def put_tensor(tensor: Bytes | StoredTensor, place: StoredTensor, *, durable: bool = False) -> None:
    """Copy a tensor to its place in a file that is there, read it back and compare.

    durable: wait until it is on the disk

    Raises:
        FileError: the file system said no, or gave back something else.
    """
    if tensor.spec != place.spec:
        raise FileError(f"{place.file}: tensor {tensor.spec.name!r} is not as planned")
    if tensor == place:
        raise FileError(f"{place.file}: tensor {tensor.spec.name!r} was not written")
    with named(place.file), open(place.file, "r+b", buffering=0) as file:
        descriptor = file.fileno()
        for start, piece in _pieces(tensor):
            _write_all(descriptor, piece, place.offset + start)
            back = np.empty(len(piece), np.uint8)
            count = os.preadv(descriptor, [back.data], place.offset + start)
            if count < len(piece) or not np.array_equal(back, piece):
                raise FileError(f"{place.file}: tensor {tensor.spec.name!r} reads back different")
        if durable:
            os.fsync(descriptor)
        elif _sync_file_range is not None:  # begins to write to the disk; errors show at the end
            offset, size = ctypes.c_int64(place.offset), ctypes.c_int64(tensor.spec.nbytes)
            _sync_file_range(descriptor, offset, size, _START_WRITING)


def _pieces(tensor: Bytes | StoredTensor) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """A tensor's bytes, a piece that fits the cache at a time, each with its place."""
    starts = range(0, tensor.spec.nbytes, _PIECE)
    if isinstance(tensor, StoredTensor) and tensor.strides is not None:
        tensor = mapped(tensor)
    if isinstance(tensor, Bytes):
        yield from ((start, tensor.data[start : start + _PIECE]) for start in starts)
        return
    with named(tensor.file), FileIO(tensor.file) as file:
        room = np.empty(min(_PIECE, tensor.spec.nbytes), np.uint8)
        for start in starts:
            piece = room[: tensor.spec.nbytes - start]
            read_exactly(file, tensor.offset + start, piece)
            yield start, piece


def mapped(stored: Bytes | StoredTensor) -> Bytes:
    """A tensor as bytes, memory-mapped where it lies in a file as it is."""
    if isinstance(stored, Bytes):
        return stored
    if stored.strides is not None:
        return as_bytes(stored.spec.name, read_strided(stored))
    if stored.spec.nbytes == 0:
        return Bytes(stored.spec, np.empty(0, np.uint8))
    if regular_file(stored.file) < stored.offset + stored.spec.nbytes:
        raise FileError(f"{stored.file}: changed while it was read")
    with named(stored.file):
        shape = (stored.spec.nbytes,)
        return Bytes(stored.spec, np.memmap(stored.file, np.uint8, "r", stored.offset, shape))


def _write_all(descriptor: int, data: NDArray[np.uint8], place: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:].data, place + done)


def _cut(parts: Sequence[Part], max_shard: int) -> list[list[Part]]:
    """Parts in order, in shards of at most `max_shard` bytes; a larger part is one of its own."""
    shards: list[list[Part]] = [[]]
    room = max_shard
    for part in parts:
        size = sum(spec.nbytes for spec in part[1])
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard
        shards[-1].append(part)
        room -= size
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [f"model{SUFFIX}"]
    return [f"model-{i + 1:05d}-of-{count:05d}{SUFFIX}" for i in range(count)]


def _laid_out(path: Path, parts: Sequence[Part], longest: Metadata) -> Shard:
    """Find every tensor its place, behind a header of the greatest length it can have."""
    modules = [name for name, _ in parts]
    specs = [spec for _, own in parts for spec in own]
    specs.sort(key=lambda spec: (-DTYPE_BITS[spec.dtype], spec.name))
    start = len(_header(specs, longest(modules)))
    offsets = accumulate((spec.nbytes for spec in specs), initial=start)
    return Shard(path, modules, list(map(StoredTensor, specs, repeat(path), offsets)), start)


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str], size: int = 0) -> bytes:
    """Length and header, filled up to `size`, and to a multiple of eight bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    length = max(size - 8, -(-len(text) // 8) * 8)
    return length.to_bytes(8, "little") + text.ljust(length)
