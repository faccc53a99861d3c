"""Quantized checkpoints seen as the float models that they stand for.

A tensor is decoded when it is read, alone: in float32 where it is rounded again, in the model's
float dtype where it is copied. Of experts that are one tensor, one is decoded at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format, PackedTensor
from ptq_cli.core.tensors import DTYPE_BITS, Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError, stated_in
from ptq_cli.formats.common import SCALE_NAMES
from ptq_cli.formats.sources import with_dtype, without_declaration
from ptq_cli.numerics.parallel import each, pieces
from ptq_cli.registry import format_named, read_only_layout
from ptq_cli.storage.checkpoint import Checkpoint, Rows, StoredTensor
from ptq_cli.storage.digest import Digest
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes


@dataclass(frozen=True)
class DecodedTensor(StoredTensor):
    """A float tensor that is decoded from others, where the first of them lies.

    layout: the name of the format, or of the layout that is only read
    packed: what that knows of the tensor
    parts: the tensors that it is decoded from, by name
    """

    layout: str = field(kw_only=True)
    packed: Layer | PackedTensor = field(kw_only=True)
    parts: Mapping[str, StoredTensor] = field(kw_only=True)

    @property
    def entries(self) -> bool:
        """Whether experts are decoded one by one."""
        return isinstance(self.packed, PackedTensor) and self.packed.entries

    def decode(self, entries: slice = slice(None)) -> NDArray[np.float32]:
        """Its values in its shape; or those of some entries of the first axis.

        Raises:
            InputError: what is stored means no number.
            FileError: a file cannot be read, or ends early.
        """
        with stated_in(self.file), np.errstate(over="ignore", invalid="ignore"):
            if isinstance(self.packed, Layer):
                return self.packed.as_stored(self.weight().dequantized())[entries]
            read, parts = Checkpoint(self.file, None, self.file, self._taken(entries)).read, {}
            for word, name in self.packed.parts.items():
                parts[word] = read(name)
            return read_only_layout(self.layout).decode(self.packed, parts)

    def weight(self) -> QuantizedWeight:
        """As the format decodes it."""
        assert isinstance(self.packed, Layer)
        stored = Checkpoint(self.file, None, self.file, self.parts)
        return decoded_weight(stored, format_named(self.layout), self.packed)

    def _taken(self, entries: slice) -> Mapping[str, StoredTensor]:
        """The parts of some entries."""
        if entries == slice(None):
            return self.parts
        taken = {}
        for name, part in self.parts.items():
            start, stop, _ = entries.indices(part.spec.shape[0])
            shape = (stop - start, *part.spec.shape[1:])
            one = part.spec.nbytes // part.spec.shape[0]
            spec = replace(part.spec, shape=shape)
            taken[name] = replace(part, spec=spec, offset=part.offset + start * one)
        return taken


@dataclass(frozen=True)
class _RowsOfWeight:
    """The rows of a rounded weight as float32."""

    weight: QuantizedWeight

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        return self.weight.dequantized(rows)


@dataclass(frozen=True)
class _RowsOfEntries:
    """Experts as rows, each decoded when it is asked for."""

    tensor: DecodedTensor

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        values = self.tensor.decode(slice(*rows.indices(self.tensor.spec.shape[0])))
        return values.reshape(len(values), -1)


@dataclass(frozen=True)
class DecodedCheckpoint(Checkpoint):
    """quantized_as: how its tensors are quantized, in words; dtype: the model's float dtype"""

    quantized_as: str = field(kw_only=True)
    dtype: str = field(kw_only=True)

    @property
    def origin(self) -> str | None:
        return self.quantized_as

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return with_dtype(without_declaration(super().config), self.dtype)

    @property
    def files(self) -> list[Path]:
        stored = _stored(self.tensors.values())
        return sorted({tensor.file for tensor in stored})

    def is_decoded(self, name: str) -> bool:
        return _whole(self.tensors[name]) is not None

    def rows(self, name: str, shape: tuple[int, int]) -> Rows:
        stored = self.tensors[name]
        tensor = _whole(stored)
        if tensor is None:
            return super().rows(name, shape)
        if tensor is not stored:
            return _expert(stored, tensor).reshape(shape)
        if tensor.entries and shape[0] == stored.spec.shape[0]:
            return _RowsOfEntries(tensor)
        if isinstance(tensor.packed, Layer) and shape == tensor.packed.shape == stored.spec.shape:
            with stated_in(tensor.file):
                return _RowsOfWeight(tensor.weight())
        return tensor.decode().reshape(shape)

    def read(self, name: str) -> Array:
        if not self.is_decoded(name):
            return super().read(name)
        return decoded_as(self, name, self.tensors[name].spec.dtype)

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        if not self.is_decoded(name):
            return super().read_bytes(name)
        return np.ascontiguousarray(self.read(name)).reshape(-1).view(np.uint8)

    def digest(self, name: str) -> str:
        tensor = _whole(self.tensors[name])
        if tensor is None:
            return super().digest(name)
        digest = Digest(repr(self.tensors[name].spec), repr(tensor.packed))
        whole = Checkpoint(self.path, None, self.weights, tensor.parts)
        for part in tensor.parts:
            digest.update(whole.read_bytes(part))
        return digest.hexdigest()

    def copyable(self, name: str) -> StoredTensor | Bytes:
        if not self.is_decoded(name):
            return super().copyable(name)
        return Bytes(self.tensors[name].spec, self.read_bytes(name))

    def streams(self, layer: Layer) -> bool:
        return not self.is_decoded(layer.tensor) and super().streams(layer)

    @cached_property
    def fingerprint(self) -> str:
        """Of the tensors as they are stored, and of how they are decoded."""
        stored = {tensor.spec.name: tensor for tensor in _stored(self.tensors.values())}
        digest = hashlib.sha256()
        digest.update(Checkpoint(self.path, None, self.weights, stored).fingerprint.encode())
        decoded = filter(None, map(_whole, self.tensors.values()))
        whole = {tensor.spec.name: tensor for tensor in decoded}
        for _, tensor in sorted(whole.items()):
            digest.update(repr((tensor.layout, tensor.packed, self.dtype)).encode())
        return digest.hexdigest()


def _whole(stored: StoredTensor) -> DecodedTensor | None:
    """What has to be decoded for a tensor, or None where it lies in its file as it is seen."""
    tensor = stored if stored.part_of is None else stored.part_of
    return tensor if isinstance(tensor, DecodedTensor) else None


def _stored(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """The tensors that lie in files, of those that are seen."""
    for tensor in tensors:
        whole = _whole(tensor)
        yield from (tensor,) if whole is None else whole.parts.values()


def _expert(stored: StoredTensor, whole: DecodedTensor) -> NDArray[np.float32]:
    """A part of one entry of a tensor, which alone is decoded."""
    itemsize, size = DTYPE_BITS[whole.spec.dtype] // 8, prod(whole.spec.shape[1:])
    expert, first = divmod((stored.offset - whole.offset) // itemsize, size)
    entry = slice(expert, expert + 1)
    values: NDArray[np.float32]
    (values,) = whole.decode(entry) if whole.entries else whole.decode()[entry]
    if stored.strides is None:
        return values.reshape(-1)[first:][: prod(stored.spec.shape)].reshape(stored.spec.shape)
    columns = whole.spec.shape[-1]
    steps = (divmod(stride // itemsize, columns) for stride in stored.strides)
    strides = [rows * values.strides[0] + own * values.strides[1] for rows, own in steps]
    corner = values[first // columns :, first % columns :]
    part: NDArray[np.float32] = np.lib.stride_tricks.as_strided(corner, stored.spec.shape, strides)
    return part


def decoded_weight(checkpoint: Checkpoint, fmt: Format, layer: Layer) -> QuantizedWeight:
    """The rounded weight of a layer. Raises InputError for scales and groups that mean nothing."""
    tensors = {spec.name: checkpoint.read(spec.name) for spec in fmt.specs(layer)}
    with stated_in(checkpoint.weights):
        weight = fmt.decode(layer, tensors)
    for values in (weight.scales, weight.offsets, weight.super_scales, weight.super_offsets):
        if values is not None and not np.isfinite(values.astype(np.float32)).all():
            raise InputError(f"{checkpoint.path}: scales of {layer.module!r} are not finite")
    groups, there = weight.g_idx, weight.scales.shape[1]
    if groups is not None and groups.size and not 0 <= groups.min() <= groups.max() < there:
        raise InputError(
            f"{checkpoint.weights}: g_idx of {layer.module!r} holds groups"
            f" {groups.min()} … {groups.max()}, there are {there}"
        )
    return weight


def decoded_as(checkpoint: Checkpoint, name: str, dtype: str) -> Array:
    """A tensor in a float dtype, a few rows at a time.

    Raises:
        InputError: a value is too large for it.
    """
    shape = checkpoint.tensors[name].spec.shape
    matrix = (shape[0], prod(shape[1:])) if shape else (1, 1)
    rows, result = checkpoint.rows(name, matrix), np.empty(matrix, NUMPY_DTYPES[dtype])

    def convert(part: slice) -> bool:
        with np.errstate(over="ignore", invalid="ignore"):
            result[part] = rows[part]
        return bool(np.isfinite(result[part]).all())

    if not all(each(convert, pieces(0, *matrix))):
        raise InputError(
            f"{checkpoint.tensors[name].file}: tensor {name!r} {list(shape)}: a value is too large"
            f" for {SCALE_NAMES.get(dtype, dtype)}, or is not finite",
            hint="--dtype float32" if dtype == "F16" else None,
        )
    return result.reshape(shape)


def decoded_checkpoint(
    base: Checkpoint,
    quantized_as: str,
    dtype: str,
    layout: str,
    packed: Iterable[Layer | PackedTensor],
    dropped: Iterable[str],
) -> DecodedCheckpoint:
    """A quantized checkpoint as the float model, tensors in their order in the files.

    layout: the name of the format or layout, packed: the tensors that are in it
    dropped: names of tensors that a float model has no use for
    """
    owner: dict[str, DecodedTensor] = {}
    for entry in packed:
        tensor = _decoded(base, dtype, layout, entry)
        owner |= dict.fromkeys(tensor.parts, tensor)
    left, tensors = set(dropped), dict[str, StoredTensor]()
    for name, stored in base.tensors.items():
        if name in owner:
            tensors[owner[name].spec.name] = owner[name]
        elif name not in left:
            tensors[name] = stored
    own = {own.name: getattr(base, own.name) for own in fields(Checkpoint)}
    own |= {"tensors": tensors, "metadata": {}}
    return DecodedCheckpoint(**own, quantized_as=quantized_as, dtype=dtype)


def _decoded(
    base: Checkpoint, dtype: str, layout: str, entry: Layer | PackedTensor
) -> DecodedTensor:
    if isinstance(entry, Layer):
        names = [spec.name for spec in format_named(layout).specs(entry)]
        known = entry.dtype if layout == "ptq" else dtype  # others do not say it of each tensor
        spec = TensorSpec(entry.tensor, known, entry.full_shape)
    else:
        names = list(entry.parts.values())
        spec = TensorSpec(entry.name, dtype, entry.shape)
    first = base.tensors[names[0]]
    parts = {name: base.tensors[name] for name in names}
    return DecodedTensor(spec, first.file, first.offset, layout=layout, packed=entry, parts=parts)
