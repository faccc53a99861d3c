"""Scratch files: what a forward keeps between two stages, and at the boundaries of blocks.

`Scratch` holds the arrays of a batch in one file, raw, one after the other; the index is in memory,
so they are lost with the process. `Rows` is a matrix of float32 that survives it: it is filled
under another name, synced and renamed, so a file of the right size is whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array
from ptq_cli.storage.files import named, read_into, sync_folder


class Scratch:
    """Arrays by key and name, in files of a folder that is emptied first."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with named(folder):
            folder.mkdir(parents=True)
        self.folder = folder
        self._index: dict[str, dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]] = {}

    def put(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Keep `arrays` under `key`, in place of what was there."""
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


class Rows:
    """A float32 matrix [n, width] in a file: written piece by piece in any order, then read."""

    def __init__(self, path: Path, n: int, width: int) -> None:
        self.path, self.n, self.width = path, n, width
        self._partial = path.with_name(path.name + ".tmp")

    @property
    def whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == 4 * self.n * self.width

    def begin(self) -> None:
        """Begin to write."""
        with named(self._partial), open(self._partial, "wb") as file:
            os.truncate(file.fileno(), 4 * self.n * self.width)

    def write(self, start: int, rows: NDArray[np.float32]) -> None:
        """Rows from `start` on; several threads may write at once."""
        with named(self._partial), open(self._partial, "r+b") as file:
            file.seek(4 * start * self.width)
            file.write(np.ascontiguousarray(rows, np.float32).data)

    def finish(self) -> None:
        """Everything is written: give the file its name."""
        with named(self.path):
            with open(self._partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._partial, self.path)
        sync_folder(self.path.parent)

    def read(self, rows: slice) -> NDArray[np.float32]:
        values = np.empty((rows.stop - rows.start, self.width), np.float32)
        read_into(self.path, 4 * rows.start * self.width, values.reshape(-1).view(np.uint8))
        return values

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)


def temporary_place() -> Path:
    """Where scratch files of a command without an output lie: TMPDIR says."""
    return Path(tempfile.gettempdir())


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for scratch files, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="ptq-") as name:
        yield Path(name)
