"""GGUF in, GGUF out: all of the file is copied as it is but the matrices that were rounded, and
what is said of them.

Key-values are copied with their kinds, byte for byte, and in their order; general.file_type,
general.quantization_version and this tool's own key are made anew. Tensors keep their names, their
order and the order of their rows. Experts are put together again as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from ptq_cli.core.layer import Layer
from ptq_cli.core.names import fold_names
from ptq_cli.core.tensors import FLOAT_DTYPES
from ptq_cli.errors import InputError
from ptq_cli.formats import fused
from ptq_cli.formats.gguf import block_type
from ptq_cli.formats.gguf.metadata import FILE_TYPES
from ptq_cli.models.gguf_names import Placing
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.gguf_file import SPLIT_KEYS, GgufTensor
from ptq_cli.storage.gguf_placing import cast, placed
from ptq_cli.storage.gguf_view import GgufView, scaled_away
from ptq_cli.storage.gguf_write import Data, Outgoing, encoded_keys
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes

_QUANTIZATION_VERSION = 2  # of ggml's types


def file_type(layers: Sequence[Layer]) -> str:
    """The type that most weights have."""
    return block_type(fused.commonest(layers).grid).name


def check_copied(view: GgufView, layers: Sequence[Layer]) -> None:
    """What could keep the file from being written, found before any work.

    Raises:
        InputError: a tensor of all experts of which some are rounded, or in different types.
    """
    kinds = {layer.tensor: block_type(layer.grid).name for layer in layers}
    for stored, names in view.members().items():
        found = {kinds.get(name, "left alone") for name in names}
        if len(found) > 1:
            odd = [name for name in names if kinds.get(name) != kinds.get(names[0])]
            raise InputError(
                f"tensor {stored!r} holds {len(names)} experts, which must have one type:"
                f" {', '.join(sorted(found))} ({fold_names(odd)})"
            )


def copied_keys(
    view: GgufView, layers: Mapping[str, Layer], own: Mapping[str, Any]
) -> dict[str, bytes]:
    """The key-values of the output. own: those that are made anew"""
    header = view.header
    keys = {key: header.encoded(key) for key in header.places if key not in SPLIT_KEYS}
    kind = FILE_TYPES[file_type(list(layers.values()))]
    made = {"general.file_type": kind, "general.quantization_version": _QUANTIZATION_VERSION}
    return keys | encoded_keys({**made, **own})


def copied_tensors(
    source: Checkpoint,
    parts: Sequence[tuple[str, Sequence[Bytes]]],
    layers: Mapping[str, Layer],
    stored_as: Mapping[str, str],
) -> tuple[list[Outgoing], list[Callable[[], Data]]]:
    """The tensors of the output, and what gives the data of each.

    source: a view of a GGUF file
    parts: what is written anew, rounded or smoothed; all else is copied
    stored_as: types of dense tensors, where one was asked for
    """
    view = source.gguf
    assert view is not None
    anew = {tensor.spec.name: tensor for _, own in parts for tensor in own}
    kinds = {layer.tensor: block_type(layer.grid).name for layer in layers.values()}
    members, dropped = view.members(), scaled_away(view, anew)
    tensors: list[Outgoing] = []
    data: list[Callable[[], Data]] = []
    for stored in view.header.tensors:
        names = members.get(stored.spec.name, [])
        if stored.spec.name in dropped:
            continue
        placing = view.placing(names[0]) if names else Placing()
        if anew.keys() & names:
            own = [anew[name] for name in names]
            kind = kinds.get(names[0], own[0].spec.dtype)
            nbytes = sum(tensor.spec.nbytes for tensor in own)
            tensors.append(Outgoing(replace(stored.spec, dtype=kind), nbytes))
            data.append(partial(_in_order, own, placing))
        elif names and stored_as.get(names[0], stored.spec.dtype) != stored.spec.dtype:
            spec = replace(stored.spec, dtype=stored_as[names[0]])
            tensors.append(Outgoing(spec, spec.nbytes))
            data.append(partial(_cast, source, names, spec.dtype, placing))
        else:
            tensors.append(Outgoing(stored.spec, stored.nbytes))
            data.append(partial(_where_it_lies, stored))
    return tensors, data


def _cast(source: Checkpoint, names: Sequence[str], kind: str, placing: Placing) -> Data:
    """Dense tensors in another type, as they stand in the file."""
    parts = []
    for name in names:
        shape = source.specs[name].shape
        values = source.matrix(name, (prod(shape[:-1]), shape[-1])).reshape(shape)
        parts.append(cast(name, placed(values, placing), kind))
    return parts


def _where_it_lies(tensor: GgufTensor) -> GgufTensor:
    return tensor


def _in_order(tensors: Sequence[Bytes], placing: Placing) -> Data:
    """Each as it stands in the file; packed rows are those of the transposed matrix already."""
    if not placing.changes:
        return [tensor.data for tensor in tensors]
    (only,) = tensors
    values = only.data.view(NUMPY_DTYPES[only.spec.dtype]).reshape(only.spec.shape)
    is_float = only.spec.dtype in FLOAT_DTYPES
    return placed(values, placing if is_float else Placing(placing.heads))
