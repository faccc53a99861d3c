"""The model that a command works on, whatever it is stored as: float, quantized, GGUF."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import PackedTensor
from ptq_cli.core.tensors import is_float
from ptq_cli.errors import InputError
from ptq_cli.formats.common import model_dtype, stated_dtype
from ptq_cli.formats.sources import quantized_as
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.decoded import decoded_checkpoint
from ptq_cli.storage.experts import one_by_one
from ptq_cli.storage.gguf_source import open_gguf_source
from ptq_cli.storage.quantized import (
    already_quantized,
    check_float,
    find_quantized,
    find_read_only,
    gguf_of,
    not_read,
)
from ptq_cli.storage.weights import check_whole

# Of inputs and of the KV cache, which the float model does not round; and marks of a layout.
_OF_RUNTIMES = re.compile(
    r"\.((input|activation)_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point)|weight_format)$"
)


def open_float(path: Path, *, any_architecture: bool = False) -> Checkpoint:
    """Open the model that a command works on, its experts one by one. What is quantized already is
    seen as the float model that it stands for, and decoded tensor by tensor when it is read.

    any_architecture: as for `open_gguf_source`

    Raises InputError, FileError: in a layout that is not read, or as `check_float`.
    """
    gguf = gguf_of(path)
    if gguf is not None:
        root = path if path.is_dir() else None
        return open_gguf_source(gguf, root, any_architecture=any_architecture)
    checkpoint = open_checkpoint(path)
    check_whole(checkpoint.weights)
    found = already_quantized(checkpoint)
    if found is not None:
        checkpoint = _as_floats(checkpoint, *found)
    check_float(checkpoint)
    return one_by_one(checkpoint)


def _as_floats(checkpoint: Checkpoint, what: str, shown: str) -> Checkpoint:
    """A quantized checkpoint as the float model. what, shown: as `quantized_as` says it

    Raises:
        InputError: it is in no layout that is read, or damaged.
    """
    layout, packed = _packed(checkpoint)
    if not packed:
        raise not_read(checkpoint.path, what, shown)
    dropped = [name for name in checkpoint.tensors if _OF_RUNTIMES.search(name)]
    found = decoded_checkpoint(checkpoint, what, _dtype(checkpoint), layout, packed, dropped)
    left = quantized_as(found.specs, found.config)
    if left is not None:
        raise InputError(
            f"{checkpoint.path}: quantized already: {left[0]} ({left[1]}), beside {layout}, which"
            " does not say how to read it",
            hint="start from the float model",
        )
    return found


def _packed(checkpoint: Checkpoint) -> tuple[str, Sequence[Layer | PackedTensor]]:
    """The name of the layout and the tensors that are in it; none where it is not known."""
    found = find_read_only(checkpoint)
    if found is not None:
        return found
    folder = find_quantized(checkpoint)
    return ("", ()) if folder is None else (folder.fmt.name, list(folder.layers.values()))


def _dtype(checkpoint: Checkpoint) -> str:
    """The model's float dtype: what config.json states, else the narrowest of its float tensors,
    scales aside."""
    stated = stated_dtype(checkpoint.config)
    if stated is not None:
        return stated
    floats = [spec for spec in checkpoint.specs.values() if is_float(spec)]
    return model_dtype(checkpoint.config, {s.dtype for s in floats if "scale" not in s.name})
