"""How a model's tensors stand in a GGUF file: their types, the order of their rows, experts stacked
in one tensor of all.

Matrices that are not quantized become F16 (F32 where that cannot hold them, and those that choose
experts), vectors F32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats.gguf import block_type, permute_rows, unpermute_rows
from ptq_cli.models.family import text_config
from ptq_cli.models.gguf_keys import frequency_factors
from ptq_cli.models.gguf_names import GgufNames, Placing, is_stack, names_of_model
from ptq_cli.numerics.scales import LEAST_SCALES, SCALE_LIMITS
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.gguf_write import Data, Outgoing
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


def cast(name: str, values: Array, kind: str) -> Array:
    """A dense tensor in another type. Raises InputError where a value does not fit."""
    with np.errstate(over="ignore"):
        result: Array = values.astype(NUMPY_DTYPES[kind])
    if not np.isfinite(result).all():
        raise InputError(
            f"tensor {name!r} holds values that {kind} cannot", hint=f"--include {name}"
        )
    return result


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
class _Part:
    """A tensor on its way into the file, alone or as one of all experts.

    kind: ggml's type; tensor: as it is staged
    """

    kind: str
    tensor: Bytes
    placing: Placing

    @property
    def is_packed(self) -> bool:
        """Rows of blocks, which are those of the transposed matrix where that is stored."""
        return self.kind not in FLOAT_DTYPES

    def data(self, kind: str) -> Array:
        stored = _stored_values(self.tensor)
        values = stored if self.is_packed else cast(self.tensor.spec.name, stored, kind)
        return placed(values, Placing(self.placing.heads) if self.is_packed else self.placing)


def made_tensors(
    source: Checkpoint, parts: Parts, layers: Mapping[str, Layer], stored_as: Mapping[str, str]
) -> tuple[list[Outgoing], list[Callable[[], Data]]]:
    """What is written of a checkpoint: GGUF's names and types, and what gives the data.

    parts: tensors by the layers that they are, or by their own names
    stored_as: types of dense tensors, where one was asked for
    """
    names, config = names_of_model(source.config), text_config(source.config)
    tensors: list[Outgoing] = []
    data: list[Callable[[], Data]] = []
    for own, stack in _stacks(parts, layers, stored_as, names, config).items():
        kinds = {part.kind for part in stack}
        kind = kinds.pop() if len(kinds) == 1 else "F32"  # one of all floats has to be
        spec = TensorSpec(own, kind, _shape(own, stack, layers))
        packed = sum(part.tensor.spec.nbytes for part in stack)
        tensors.append(Outgoing(spec, spec.nbytes if kind in FLOAT_DTYPES else packed))
        data.append(partial(_in_file, stack, kind))
    for own, values in frequency_factors(names, config).items():
        tensors.append(Outgoing(TensorSpec(own, "F32", values.shape), values.nbytes))
        data.append(partial(np.asarray, values))
    return tensors, data


def _stacks(
    parts: Parts,
    layers: Mapping[str, Layer],
    stored_as: Mapping[str, str],
    names: GgufNames,
    config: Mapping[str, Any],
) -> dict[str, list[_Part]]:
    """The tensors of the checkpoint by the names in the file, those of experts in order."""
    found: dict[str, list[tuple[int, _Part]]] = {}
    for module, tensors in parts:
        for tensor in tensors:
            name = tensor.spec.name
            if module not in layers and names.is_dropped(name):
                continue
            placing = names.placing(name, config)
            if module in layers:
                kind = block_type(layers[module].grid).name
            else:
                kind = stored_as.get(name) or dense_type(_stored_values(tensor), placing)
            place = names.expert(name) or 0, _Part(kind, tensor, placing)
            found.setdefault(names.tensor_name(name), []).append(place)
    return {own: [part for _, part in sorted(x, key=itemgetter(0))] for own, x in found.items()}


def _shape(own: str, stack: Sequence[_Part], layers: Mapping[str, Layer]) -> tuple[int, ...]:
    """The shape in the file: rows and columns of the matrix, behind the number of experts."""
    spec = stack[0].tensor.spec
    shape = spec.shape[::-1] if stack[0].placing.transposed else spec.shape
    if stack[0].is_packed:
        shape = layers[spec.name.removesuffix(".weight")].shape
    return (len(stack), *shape) if is_stack(own) else shape


def _in_file(stack: Sequence[_Part], kind: str) -> Data:
    return [part.data(kind) for part in stack]


def _stored_values(tensor: Bytes) -> Array:
    return tensor.data.view(NUMPY_DTYPES[tensor.spec.dtype]).reshape(tensor.spec.shape)
