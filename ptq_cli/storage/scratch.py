"""Scratch: what a forward keeps between two stages, and at the boundaries of blocks.

`Scratch` holds the arrays of a batch, in memory or in files, and is lost with the process. `Rows`
is a matrix of float32 in a file that survives it. Nothing waits for the disk: the file ends with
checksums, and one that a power loss has cut or emptied counts as not there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array
from ptq_cli.storage import interruption
from ptq_cli.storage.files import named, read_into


class MemoryScratch:
    """Arrays by key and name, which nobody can change."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Array]] = {}

    def put(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Keep `arrays` under `key`, in place of what was there; one with two names once."""
        own = {id(array): _owned(array) for array in arrays.values()}
        self._kept[key] = {name: own[id(array)] for name, array in arrays.items()}

    def names(self, key: str) -> list[str]:
        return list(self._kept[key])

    def get(self, key: str, name: str) -> Array:
        return self._kept[key][name]

    def drop(self) -> None:
        self._kept.clear()


def _owned(array: Array) -> Array:
    """The array, C-ordered and read-only; a copy where it is a part of a larger one, which would
    be kept with it."""
    own = np.ascontiguousarray(array)
    base = own.base
    if base is not None and not (isinstance(base, np.ndarray) and base.nbytes == own.nbytes):
        own = own.copy()
    own = own.view()
    own.flags.writeable = False
    return own


class FileScratch:
    """The same in files of a folder that is emptied first: a file for each key, the arrays raw, one
    after the other; the index is in memory."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with named(folder):
            folder.mkdir(parents=True)
        self.folder = folder
        self._index: dict[str, dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]] = {}

    def put(self, key: str, arrays: Mapping[str, Array]) -> None:
        index, offset = {}, 0
        path = self.folder / key
        with named(path), open(path, "wb") as file:
            for name, array in arrays.items():
                file.write(np.ascontiguousarray(array).data)
                index[name] = (array.dtype, array.shape, offset)
                offset += array.nbytes
        self._index[key] = index

    def names(self, key: str) -> list[str]:
        return list(self._index[key])

    def get(self, key: str, name: str) -> Array:
        dtype, shape, offset = self._index[key][name]
        values = np.empty(prod(shape), dtype)
        read_into(self.folder / key, offset, values.view(np.uint8))
        return values.reshape(shape)

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


Scratch = MemoryScratch | FileScratch


class Rows:
    """A float32 matrix [n, width] in a file: its parts are written in any order, then read.

    path: `<stream>.<number>`; those of a stream are of one size
    parts: slices of rows, one after the other from 0 to n; the file ends with the CRC-32 of each
    """

    def __init__(self, path: Path, parts: Sequence[slice], width: int) -> None:
        self.path, self.parts, self.width = path, parts, width
        self.size = 4 * width * parts[-1].stop  # bytes before the checksums
        self._partial = path.with_suffix(".next")
        self._sums: dict[int, int] = {}

    @property
    def whole(self) -> bool:
        """Whether it is there as it was written."""
        size = self.size + 4 * len(self.parts)
        if not self.path.is_file() or self.path.stat().st_size != size:
            return False
        sums = np.empty(len(self.parts), np.uint32)
        read_into(self.path, self.size, sums.view(np.uint8))
        pairs = zip(self.parts, sums.tolist(), strict=True)
        return all(crc32(self.read(part).data) == own for part, own in pairs)

    def begin(self) -> None:
        """Begin to write, into another file: what one of the stream that was dropped has left, for
        a file system takes long to find new blocks."""
        with named(self._partial):
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch()
        self._sums = {}

    def write(self, part: slice, rows: NDArray[np.float32]) -> None:
        """One of the parts; several threads may write at once."""
        data = np.ascontiguousarray(rows, np.float32).data
        with named(self._partial), open(self._partial, "r+b") as file:
            file.seek(4 * part.start * self.width)
            file.write(data)
        self._sums[part.start] = crc32(data)

    def finish(self) -> None:
        """Everything is written: give the file its name."""
        sums = np.array([self._sums[part.start] for part in self.parts], np.uint32)
        with named(self.path):
            with open(self._partial, "r+b") as file:
                file.seek(self.size)
                file.write(sums.data)
                file.truncate()
            os.replace(self._partial, self.path)

    def read(self, part: slice) -> NDArray[np.float32]:
        """These rows."""
        values = np.empty((part.stop - part.start, self.width), np.float32)
        read_into(self.path, 4 * part.start * self.width, values.reshape(-1).view(np.uint8))
        return values

    def drop(self) -> None:
        """It is no longer needed; its file is for the next to write over."""
        with suppress(FileNotFoundError):
            os.replace(self.path, self._partial)


def temporary_place() -> Path:
    """Where scratch files of a command without an output lie: TMPDIR says."""
    return Path(tempfile.gettempdir())


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for scratch files, removed at the end, be that a signal. Raises FileError."""
    folder = temporary_place() / f"ptq-{uuid.uuid4().hex}"
    interruption.work_begins()
    try:
        with named(folder):
            folder.mkdir(0o700)
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except interruption.Stopped:  # there is no second one
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            interruption.work_ends()
