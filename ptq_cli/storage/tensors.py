"""The one gate for bytes on their way into a safetensors file.

The library writes the container. It takes pointers, so that memory-mapped results are written
without being loaded, and it would write garbage for arrays that are not C-contiguous, so the gate
makes them so. Two or more metadata keys would come out in random order: all goes into one key,
`ptq`, as sorted JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - numpy learns the words bfloat16 and float8_…
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, serialize_file
from safetensors import TensorSpec as Pointer

from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.errors import FileError, InputError
from ptq_cli.storage.files import named, sync_file

# safetensors' words in a header, and its words for the same dtypes when writing.
_WORDS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
}  # fmt: skip

_HEADER_WORDS = {word: header for header, word in _WORDS.items()}

WRITABLE = frozenset(_WORDS)

# What tensors are read as, but for complex numbers.
NUMPY_DTYPES = {header: np.dtype(word) for header, word in _WORDS.items() if header != "C64"}


@dataclass(frozen=True)
class Bytes:
    """The bytes of a tensor, uint8 [nbytes], C order, little endian: in memory or mapped."""

    spec: TensorSpec
    data: NDArray[np.uint8]


def as_bytes(name: str, values: Array) -> Bytes:
    """Any array as the bytes a file holds: C order, little endian."""
    array = np.ascontiguousarray(values)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    spec = TensorSpec(name, _HEADER_WORDS[array.dtype.name], tuple(values.shape))
    return Bytes(spec, array.reshape(-1).view(np.uint8))


def as_array(tensor: Bytes) -> Array:
    """The array that `as_bytes` was given."""
    values: Array = tensor.data.view(np.dtype(_WORDS[tensor.spec.dtype]))
    return values.reshape(tensor.spec.shape)


def own_metadata(content: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of this tool's own files: one key, sorted JSON."""
    return {"ptq": json.dumps(content, sort_keys=True, allow_nan=False)}


def quantized_metadata(
    fmt: Format, layers: Sequence[Layer], said: Mapping[str, Any] = {}
) -> dict[str, str]:
    """The metadata of a weights file with these layers, and with what else is to be said."""
    entry = {**said, "kind": "quantized", "version": 1, "format": fmt.name}
    return own_metadata({**entry, "layers": fmt.metadata(layers)})


def quantized_entry(path: Path, metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The format, and what `fmt.metadata` said of the layers; None where another tool wrote the
    file. Raises InputError where it is this tool's, but not quantized."""
    if "ptq" not in metadata:
        return None
    try:
        content = json.loads(metadata["ptq"])
        if (content["kind"], content["version"]) == ("quantized", 1):
            return str(content["format"]), dict(content["layers"])
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise InputError(
        f"{path}: not a quantized checkpoint", hint="make one with ptq gptq, rtn or pack"
    )


def serialize(path: Path, tensors: Sequence[Bytes], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place, in a folder that gets its name later.

    Raises:
        FileError: the file system said no.
    """
    pointers = {
        tensor.spec.name: Pointer(
            dtype=_WORDS[tensor.spec.dtype],
            shape=list(tensor.spec.shape),
            data_ptr=tensor.data.ctypes.data,
            data_len=tensor.data.nbytes,
        )
        for tensor in tensors
    }
    with named(path):
        open(path, "wb").close()  # the system's own word where the folder cannot be written
    try:
        serialize_file(pointers, path, metadata=dict(metadata))
    except SafetensorError as error:
        raise FileError(f"{path}: could not be written: {error}") from None
    sync_file(path)
