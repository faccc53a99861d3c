"""The values of a GGUF file's tensors, by their names there: of any architecture."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import FLOAT_DTYPES
from ptq_cli.errors import InputError
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.formats.gguf.unpack import unpack
from ptq_cli.storage.files import read_into
from ptq_cli.storage.gguf_file import GgufTensor
from ptq_cli.storage.tensors import NUMPY_DTYPES

_PIECE = 1 << 20  # values


def values_of(tensor: GgufTensor) -> Iterator[NDArray[np.float32]]:
    """A tensor's rows, float32 [rows, columns], about a million values at a time.

    Raises:
        InputError: a type that is not decoded here.
    """
    kind, columns = tensor.spec.dtype, tensor.spec.shape[-1]
    if kind not in (*TYPES, *FLOAT_DTYPES):
        raise InputError(
            f"{tensor.file}: tensor {tensor.spec.name!r} is of type {kind}, not decoded here"
        )
    rows = prod(tensor.spec.shape[:-1])
    width, step = tensor.nbytes // rows, max(1, _PIECE // columns)
    for start in range(0, rows, step):
        data = np.empty((min(step, rows - start), width), np.uint8)
        read_into(tensor.file, tensor.offset + start * width, data.reshape(-1))
        if kind in FLOAT_DTYPES:
            yield data.view(NUMPY_DTYPES[kind]).astype(np.float32)
        else:
            yield unpack(TYPES[kind], data).dequantized()
