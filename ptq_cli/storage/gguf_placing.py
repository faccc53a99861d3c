"""How a model's tensors stand in a GGUF file: their types, the order of their rows, experts stacked
in one tensor of all; there and back.

Matrices that are not quantized become F16 (F32 where that cannot hold them, and those that choose
experts), vectors F32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np

from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats.gguf import block_type, permute_rows, unpermute_rows
from ptq_cli.models.gguf_names import FREQUENCY_FACTORS, GgufNames, Placing
from ptq_cli.numerics.scales import LEAST_SCALES, SCALE_LIMITS
from ptq_cli.storage.gguf_file import GgufHeader, GgufTensor
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes

Parts = Sequence[tuple[str, Sequence[Bytes]]]


def placed(values: Array, placing: Placing) -> Array:
    """A tensor of a checkpoint as it stands in the file; rows may be packed."""
    if placing.transposed:
        values = values.T
    if placing.plus_one:
        values = values + np.float32(1)
    return values if placing.heads is None else permute_rows(values, placing.heads)


def unplaced(values: Array, placing: Placing) -> Array:
    """`placed` the other way."""
    if placing.heads is not None:
        values = unpermute_rows(values, placing.heads)
    if placing.plus_one:
        values = values - np.float32(1)
    return values.T if placing.transposed else values


def tensors_of(header: GgufHeader, names: GgufNames) -> Iterator[tuple[str, GgufTensor]]:
    """The model's tensors by their names in a checkpoint, those of experts one by one."""
    for tensor in header.tensors:
        if tensor.spec.name in FREQUENCY_FACTORS:
            continue
        own = names.checkpoint_names(tensor.spec.name, tensor.spec.shape)
        if len(own) == 1 and len(tensor.spec.shape) < 3:
            yield own[0], tensor
            continue
        size = tensor.nbytes // len(own)
        for number, name in enumerate(own):
            spec = replace(tensor.spec, shape=tensor.spec.shape[1:])
            yield name, GgufTensor(spec, tensor.offset + number * size, size)


def check_stacks(names: GgufNames, kinds: Mapping[str, str]) -> None:
    """Experts that are stacked in one tensor must all be there, of one type.

    kinds: each tensor's type, or "floats"
    """
    stacks: dict[str, dict[int, str]] = {}
    for name in kinds:
        own, expert = names.tensor_name(name), names.expert(name)
        if expert is not None:
            stacks.setdefault(own, {})[expert] = name
    for own, stack in stacks.items():
        if sorted(stack) != list(range(len(stack))):
            raise InputError(f"gguf has one tensor of all experts, {own}, and some are missing")
        found = {kinds[name]: expert for expert, name in sorted(stack.items(), reverse=True)}
        if len(found) > 1:
            said = ", ".join(f"{expert} has {kind}" for kind, expert in list(found.items())[::-1])
            raise InputError(
                f"gguf has one tensor of all experts, {own}: {said}",
                hint="give all experts of a block the same bits and symmetry, or leave out all",
            )


def dense(name: str, values: Array, kind: str) -> Array:
    """A tensor in the type that it gets. Raises InputError where a value does not fit."""
    with np.errstate(over="ignore"):
        result: Array = values.astype(NUMPY_DTYPES[kind])
    if not np.isfinite(result).all():
        raise InputError(
            f"tensor {name!r} holds values that {kind} cannot", hint=f"--include {name}"
        )
    return result


def dense_type(values: Array, placing: Placing) -> str:
    """F16 for a matrix, but F32 where float16 has no digits for one of its rows; F32 for vectors.

    values: the tensor as it is stored
    """
    if values.ndim != 2 or placing.exact:
        return "F32"
    if values.dtype == np.float16:
        return "F16"
    with np.errstate(over="ignore"):
        largest = np.abs(values).max(axis=1, initial=0).astype(np.float32)
    small = (largest > 0) & (largest < LEAST_SCALES["float16"])
    return "F32" if small.any() or (largest > SCALE_LIMITS["float16"][1]).any() else "F16"


@dataclass(frozen=True)
class Outgoing:
    """A tensor on its way into the file.

    spec: its name in the checkpoint, ggml's type, and its shape in the file
    tensor: as it is staged
    """

    spec: TensorSpec
    tensor: Bytes
    placing: Placing

    def values(self) -> Array:
        """As in the checkpoint: packed rows as bytes, dense ones in the type that they get."""
        stored = _stored_values(self.tensor)
        if self.tensor.spec.dtype == "U8":
            return stored
        return dense(self.tensor.spec.name, stored, self.spec.dtype)

    def placed(self) -> Array:
        """As in the file."""
        return placed(self.values(), self._placing)

    @property
    def _placing(self) -> Placing:
        """Packed rows are those of the transposed matrix already."""
        packed = self.tensor.spec.dtype == "U8"
        return replace(self.placing, transposed=False) if packed else self.placing

    def reads_as(self) -> Array:
        """What is read back: `values`, but for the digits that gain − 1 loses in the gain."""
        return unplaced(self.placed(), self._placing)

    @property
    def nbytes(self) -> int:
        floats = self.spec.dtype in FLOAT_DTYPES
        return self.spec.nbytes if floats else self.tensor.spec.nbytes


def outgoing(
    parts: Parts,
    layers: Mapping[str, Layer],
    names: GgufNames,
    config: Mapping[str, Any],
    stored_as: Mapping[str, str],
) -> dict[str, list[Outgoing]]:
    """The tensors of the checkpoint by the names in the file, those of experts in order."""
    found: dict[str, list[tuple[int, Outgoing]]] = {}
    for module, tensors in parts:
        for tensor in tensors:
            name = tensor.spec.name
            if module not in layers and names.is_dropped(name):
                continue
            placing = names.placing(name, config)
            if module in layers:
                spec = TensorSpec(name, block_type(layers[module].grid).name, layers[module].shape)
            else:
                usual = dense_type(_stored_values(tensor), placing)
                kind = stored_as.get(name, usual)
                shape = tensor.spec.shape[:: -1 if placing.transposed else 1]
                spec = TensorSpec(name, kind, shape)
            place = names.expert(name) or 0, Outgoing(spec, tensor, placing)
            found.setdefault(names.tensor_name(name), []).append(place)
    return {own: _of_one_type(sorted(stack, key=itemgetter(0))) for own, stack in found.items()}


def _of_one_type(stack: Sequence[tuple[int, Outgoing]]) -> list[Outgoing]:
    """Floats that are stacked are all F32 where one of them has to be."""
    kinds = {part.spec.dtype for _, part in stack}
    kind = kinds.pop() if len(kinds) == 1 else "F32"
    return [replace(part, spec=replace(part.spec, dtype=kind)) for _, part in stack]


def _stored_values(tensor: Bytes) -> Array:
    return tensor.data.view(NUMPY_DTYPES[tensor.spec.dtype]).reshape(tensor.spec.shape)
