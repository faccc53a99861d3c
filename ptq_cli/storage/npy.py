"""The one door for `.npy` files: headers checked against the file's size, never a pickle.

Files in C order are read by `pread`, so that a file that shrinks meanwhile is an error. Fortran
order is memory-mapped, as its tokens lie scattered.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ptq_cli.core.tensors import Array
from ptq_cli.errors import FileError, InputError
from ptq_cli.storage.files import named, read_into, regular_file

_MAX_HEADER = 1 << 16
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class NpyFile:
    """A checked `.npy` file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def open_npy(path: Path) -> NpyFile:
    """Read and check the header of a `.npy` file.

    Raises:
        InputError: not a .npy file, a pickle, a shape that does not match the file's size.
    """
    size = regular_file(path)
    with named(path), open(path, "rb") as file:
        magic = file.read(6)
        if magic != b"\x93NUMPY":
            what = "an .npz archive" if magic[:2] == b"PK" else "not a .npy file"
            statistics = path.suffix == ".safetensors"
            hint = "--calibration takes statistics files" if statistics else None
            raise InputError(f"{path}: {what}", hint=hint)
        file.seek(0)
        shape, fortran, dtype = _read_header(path, file)
        offset = file.tell()
    if dtype.hasobject:
        raise InputError(f"{path}: holds Python objects (a pickle), which are never loaded")
    if any(n < 0 for n in shape):
        raise InputError(f"{path}: a shape of {list(shape)}")
    wanted = offset + prod(shape) * dtype.itemsize
    if wanted != size:
        what = "cut short" if size < wanted else "followed by other bytes"
        raise InputError(
            f"{path}: {what}: {dtype.name} {list(shape)} takes {wanted} bytes, the file has {size}"
        )
    return NpyFile(path, tuple(shape), dtype, fortran, offset)


def _read_header(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python 2's headers, and of odd escapes in them
            version = np.lib.format.read_magic(file)
            if version in _READERS:
                return _READERS[version](file, max_header_size=_MAX_HEADER)
    except Exception as error:  # numpy raises ValueError, SyntaxError, tokenize errors …
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: a damaged .npy header: {first_line}") from None
    raise InputError(f"{path}: .npy version {version[0]}.{version[1]} is not supported")


@dataclass(frozen=True)
class InputsFile:
    """Activations `[..., in_features]` in one file, seen as [n_tokens, in_features]."""

    npy: NpyFile
    bf16: bool

    @property
    def n_tokens(self) -> int:
        return prod(self.npy.shape[:-1])

    @property
    def in_features(self) -> int:
        return self.npy.shape[-1]

    def read(self, start: int, stop: int) -> Array:
        """Tokens start … stop−1 in the file's own float dtype, native byte order, C order.

        Raises:
            FileError: the file became shorter since its header was read.
        """
        npy = self.npy
        if npy.fortran and len(npy.shape) > 1:
            values = self._read_fortran(start, stop)
        else:
            values = np.empty((stop - start, self.in_features), npy.dtype)
            row = self.in_features * npy.dtype.itemsize
            read_into(npy.path, npy.offset + start * row, values.reshape(-1).view(np.uint8))
        values = np.ascontiguousarray(values, npy.dtype.newbyteorder("="))
        return values.view(ml_dtypes.bfloat16) if self.bf16 else values

    def _read_fortran(self, start: int, stop: int) -> Array:
        npy = self.npy
        if regular_file(npy.path) != npy.offset + npy.size:
            raise FileError(f"{npy.path}: changed while it was read")
        with named(npy.path):
            whole = np.memmap(npy.path, npy.dtype, "r", npy.offset, npy.shape, order="F")
        token = np.unravel_index(np.arange(start, stop), npy.shape[:-1])
        return np.asarray(whole[token])


def open_inputs(path: Path, bf16: bool) -> InputsFile:
    """Open activations: float16, float32, float64, or bfloat16 kept as uint16 with `bf16`.

    Raises:
        InputError: another dtype, or fewer than two dimensions.
    """
    npy = open_npy(path)
    wanted = ("u2",) if bf16 else ("f2", "f4", "f8")
    if npy.dtype.str[1:] not in wanted:
        hint = "--bf16 reads bfloat16 saved as uint16" if npy.dtype.str[1:] == "u2" else None
        words = "uint16 (bfloat16)" if bf16 else "float16, float32 or float64"
        raise InputError(f"{path}: {npy.dtype.name} {list(npy.shape)}, not {words}", hint=hint)
    if len(npy.shape) < 2:
        raise InputError(
            f"{path}: shape {list(npy.shape)}; activations are [..., in_features], two dimensions"
            " or more"
        )
    return InputsFile(npy, bf16)
