"""The rows of a tensor, read from the file as they are asked for.

What is done with a few rows then happens in the cache, from the bytes of the file to the codes: the
tensor as a whole is never in memory. It serves where each row is looked at once.
"""

from __future__ import annotations

from io import FileIO
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer
from ptq_cli.numerics.parallel import pieces
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.digest import Message
from ptq_cli.storage.files import named, read_exactly
from ptq_cli.storage.tensors import NUMPY_DTYPES


class FileRows:
    """A layer's weight, [out_features, in_features]: `rows[a:b]` is float32. NaN and inf are
    not looked for here: every method rounds to nearest too, no scale fits them (ScaleOverflow), and
    who meets that has `check` name them.

    The layer is stored as it is seen, row by row, in a file of its own checkpoint, which is open
    inside a `with` block.
    """

    def __init__(self, checkpoint: Checkpoint, layer: Layer) -> None:
        self.shape: tuple[int, ...] = layer.shape
        self._checkpoint, self._name = checkpoint, layer.tensor
        self._stored = checkpoint.tensors[layer.tensor]
        self._dtype = NUMPY_DTYPES[self._stored.spec.dtype]
        self._row_bytes = self._stored.spec.nbytes // layer.shape[0]
        self._message, self._seen = Message(), 0
        with named(self._stored.file):
            self._file = FileIO(self._stored.file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        """Raises FileError where the file ends early."""
        start, stop, _ = rows.indices(self.shape[0])
        result = np.empty((stop - start, self.shape[1]), np.float32)
        for part in pieces(start, stop, self.shape[1]):
            values = self._read(part.start, part.stop).view(self._dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                place = result[part.start - start : part.stop - start]
                place[...] = values.reshape(place.shape)
        return result

    def check(self) -> None:
        """Raises InputError where the weight is not finite."""
        self._checkpoint.matrix(self._name, (self.shape[0], self.shape[1]))

    def _read(self, start: int, stop: int) -> NDArray[np.uint8]:
        data = np.empty((stop - start) * self._row_bytes, np.uint8)
        read_exactly(self._file, self._stored.offset + start * self._row_bytes, data)
        if start == self._seen:
            self._message.update(data)
            self._seen = stop
        return data

    def digest(self) -> str:
        """`digest_of` the tensor's bytes. Rows that were not asked for in order are read again."""
        for part in pieces(self._seen, self.shape[0], self.shape[1]):
            self._read(part.start, part.stop)
        return self._message.hexdigest()
