"""Float checkpoints: a `.safetensors` file, an index with shards, or a model folder.

A header is checked strictly before anything is believed: its length, its JSON, every dtype, shape
and offset, no name twice, no holes. Tensors are read one by one, by `pread`.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer
from ptq_cli.core.names import fold_names
from ptq_cli.core.tensors import DTYPE_BITS, Array, TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.numerics.parallel import each, pieces
from ptq_cli.storage.digest import digest_of
from ptq_cli.storage.files import (
    MAX_JSON,
    listing,
    parse_json,
    read_document,
    read_into,
    read_json,
    regular_file,
)
from ptq_cli.storage.gguf_view import GgufView
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes
from ptq_cli.storage.weights import INDEX_SUFFIX, SUFFIX, lone_shard, weights_of

MAX_HEADER = 25 << 20


class Rows(Protocol):
    """A matrix that is taken a few rows at a time."""

    def __getitem__(self, rows: slice, /) -> Array: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and the place of its bytes.

    strides: bytes from one index of each axis to the next, where the tensor does not lie there as
        it is seen; None: in C order, without gaps
    part_of: the tensor in the file that it is a part of (one of several experts), or None
    """

    spec: TensorSpec
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None
    part_of: StoredTensor | None = None

    @property
    def extent(self) -> int:
        """Bytes from the first to the last one of the tensor in its file."""
        if self.strides is None:
            return self.spec.nbytes
        steps = zip(self.spec.shape, self.strides, strict=True)
        itemsize = DTYPE_BITS[self.spec.dtype] // 8
        return sum((count - 1) * stride for count, stride in steps) + itemsize


@dataclass(frozen=True)
class Header:
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers only.

    path: what the user named; root: the model folder, None for a bare file
    weights: the file or index that names the weights; stem: its name without suffix
    """

    path: Path
    root: Path | None
    weights: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.weights.parent

    @property
    def stem(self) -> str:
        return self.weights.name.removesuffix(INDEX_SUFFIX).removesuffix(SUFFIX)

    @property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors' headers."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    @property
    def documents(self) -> Mapping[str, Any]:
        """config.json, tokenizer.json … of a checkpoint that has them in itself, by name."""
        return {}

    def document(self, name: str, limit: int = MAX_JSON) -> Any:
        """tokenizer.json and the like, from the checkpoint itself or from its folder; None where
        there is none. Raises InputError for one of more than `limit` bytes, or that is no JSON."""
        if self.documents or name not in listing(self.folder):
            return self.documents.get(name)
        return read_document(self.folder / name, limit)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json of the model folder, or of the folder a bare file lies in; {} without one."""
        config = self.document("config.json")
        if not isinstance(config, dict | None):
            raise InputError(f"{self.folder / 'config.json'}: not a JSON object")
        return config or {}

    def read(self, name: str) -> Array:
        """A tensor in the dtype it is stored in.

        Raises:
            InputError: there is none of that name, or its dtype is one numpy has no word for.
            FileError: the file cannot be read, or ends early.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise InputError(f"{self.path}: no tensor {name!r}")
        if stored.spec.dtype not in NUMPY_DTYPES:
            raise InputError(f"{stored.file}: tensor {name!r}: cannot read {stored.spec.dtype}")
        if stored.strides is not None:
            return read_strided(stored)
        values = self.read_bytes(name).view(NUMPY_DTYPES[stored.spec.dtype])
        return values.reshape(stored.spec.shape)

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, uint8 [nbytes]."""
        stored = self.tensors[name]
        if stored.strides is not None:
            return np.ascontiguousarray(read_strided(stored)).reshape(-1).view(np.uint8)
        buffer = np.empty(stored.spec.nbytes, np.uint8)
        read_into(stored.file, stored.offset, buffer)
        return buffer

    def extent(self, name: str) -> int:
        """Bytes from the first to the last one of a tensor in its file."""
        return self.tensors[name].extent

    def is_decoded(self, name: str) -> bool:
        """Whether the file holds a tensor quantized, and it is decoded when it is read."""
        return False

    @property
    def gguf(self) -> GgufView | None:
        """The GGUF file that it is a view of; None: it is of something else, or a part of one."""
        return None

    @property
    def origin(self) -> str | None:
        """How the model was quantized before, in words; None: it is float."""
        return None

    def digest(self, name: str) -> str:
        """`digest_of` what a tensor is read from."""
        return digest_of(self.read_bytes(name))

    def copyable(self, name: str) -> StoredTensor | Bytes:
        """A tensor as it is to be copied: where it lies, unless its bytes lie there in disorder."""
        return self.tensors[name]

    def matrix(self, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        """A float tensor as float32 [out_features, in_features], every value finite.

        Raises:
            InputError: NaN or inf, with its first index and how many there are.
        """
        rows, result = self.rows(name, shape), np.empty(shape, np.float32)

        def convert(part: slice) -> bool:
            with np.errstate(over="ignore", invalid="ignore"):
                result[part] = rows[part]
                ends = result[part].min(initial=0), result[part].max(initial=0)
            return bool(np.isfinite(ends).all())  # NaN would be both

        parts = pieces(0, *shape)
        if not all([convert(part) for part in parts] if len(parts) < 4 else each(convert, parts)):
            self._refuse(name, rows[:].reshape(self.tensors[name].spec.shape))
        return result

    def rows(self, name: str, shape: tuple[int, int]) -> Rows:
        """A float tensor as [out_features, in_features], as exact as it is known."""
        return self.read(name).reshape(shape)

    def _refuse(self, name: str, values: Array) -> NoReturn:
        with np.errstate(over="ignore", invalid="ignore"):
            bad = ~np.isfinite(values.astype(np.float32))
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        what = "NaN or inf" if not np.isfinite(values[first]) else "a value too large for float32"
        raise InputError(
            f"{self.tensors[name].file}: tensor {name!r} {list(values.shape)}: {what} at index"
            f" {list(first)}, {int(bad.sum())} in all",
            hint="mend the checkpoint, or (without --tokens) leave the tensor out with --ignore",
        )

    def part(self, names: Iterable[str]) -> Checkpoint:
        """Some of its tensors alone: all that a worker needs, and quickly sent."""
        return replace(self, tensors={name: self.tensors[name] for name in names})

    def holding(self, tensors: Mapping[str, StoredTensor]) -> Checkpoint:
        """The same checkpoint, seen as these tensors."""
        return replace(self, tensors=tensors)

    def weight(self, layer: Layer) -> NDArray[np.float32]:
        """A layer's weight, float32 [out_features, in_features], whichever way it is stored."""
        if not layer.transposed:
            return self.matrix(layer.tensor, layer.shape)
        return np.ascontiguousarray(self.matrix(layer.tensor, layer.shape[::-1]).T)

    def streams(self, layer: Layer) -> bool:
        """Whether the layer's rows lie in the file one after the other, as they are, and are looked
        at a few at a time."""
        lies_so = self.tensors[layer.tensor].strides is None
        return lies_so and not layer.transposed and layer.grid.by_rows

    def output_scale(self, layer: Layer) -> NDArray[np.float32] | None:
        """What a layer's outputs have to be multiplied by to be those of the checkpoint on the
        disk, [out_features]; None: they are."""
        return None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every tensor's name, dtype, shape, and first and last 4 KiB: tells one set of
        weights from another without reading them all, wherever they lie."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            stored = self.tensors[name]
            spec = stored.spec
            digest.update(repr((spec.name, spec.dtype, spec.shape)).encode())
            extent = self.extent(name)
            size = min(4096, extent)
            for offset in (0, extent - size):
                sample = np.empty(size, np.uint8)
                read_into(stored.file, stored.offset + offset, sample)
                digest.update(sample.data)
        return digest.hexdigest()


def read_strided(stored: StoredTensor) -> Array:
    """A tensor that lies in its file with strides, in the dtype and the order it is stored in.

    Raises:
        FileError: the file cannot be read, or ends early.
    """
    assert stored.strides is not None
    buffer = np.empty(stored.extent, np.uint8)
    read_into(stored.file, stored.offset, buffer)
    values = buffer.view(NUMPY_DTYPES[stored.spec.dtype])
    return np.lib.stride_tricks.as_strided(values, stored.spec.shape, stored.strides)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.safetensors` file, a `*.safetensors.index.json` or a model folder.

    Raises:
        InputError: nothing of the kind, or a header or index that lies.
        FileError: the file system's own word.
    """
    root, weights = (path, weights_of(path)) if path.is_dir() else (None, path)
    if weights.name.endswith(INDEX_SUFFIX):
        return _open_index(path, root or path.parent, weights)
    header = read_header(weights)
    tensors = {tensor.spec.name: tensor for tensor in header.tensors}
    alone = lone_shard(weights)
    warnings = () if alone is None else (alone,)
    return Checkpoint(path, root, weights, tensors, header.metadata, warnings)


def _open_index(path: Path, root: Path, index: Path) -> Checkpoint:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map")
    shards = sorted({_shard_name(index, name, shard) for name, shard in weight_map.items()})
    present = set(listing(index.parent))
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise InputError(
            f"{index}: {len(missing)} of {len(shards)} shards missing: {fold_names(missing)}"
        )
    tensors: dict[str, StoredTensor] = {}
    homes: dict[str, str] = {}
    warnings: list[str] = []
    metadata: dict[str, str] = {}
    for shard in shards:
        header = read_header(index.parent / shard)
        metadata = _merge_metadata(metadata, header.metadata)
        for tensor in header.tensors:
            name = tensor.spec.name
            if name in homes:
                raise InputError(f"{index}: tensor {name!r} is in {homes[name]} and {shard}")
            homes[name] = shard
            if weight_map.get(name) != shard:
                warnings.append(
                    f"{shard}: tensor {name!r} is not in the index there; it is ignored"
                )
                continue
            tensors[name] = tensor
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise InputError(
            f"{index}: {len(lost)} tensors are not in their shards: {fold_names(lost)}"
        )
    return Checkpoint(path, root, index, tensors, metadata, tuple(warnings))


def _merge_metadata(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Metadata of shards; the layers that this tool's own entry names are united."""
    merged = {**second, **first}
    try:
        one, other = (json.loads(metadata["ptq"]) for metadata in (first, second))
        layers = {**one["layers"], **other["layers"]}
        merged["ptq"] = json.dumps({**one, **other, "layers": layers}, sort_keys=True)
    except (LookupError, TypeError, ValueError):
        pass
    return merged


def _shard_name(index: Path, tensor: str, shard: object) -> str:
    plain = isinstance(shard, str) and shard.endswith(SUFFIX) and Path(shard).name == shard
    if not plain or "\\" in str(shard) or ":" in str(shard):
        raise InputError(
            f"{index}: tensor {tensor!r}: {shard!r} is not the plain name of a .safetensors file"
        )
    return str(shard)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file (storage/shards.py explains the layout)."""
    size = regular_file(path)
    start = np.empty(min(size, 512), np.uint8)
    read_into(path, 0, start)
    length = int.from_bytes(start[:8].tobytes(), "little")
    if start.tobytes().startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a git-lfs pointer, not the file itself", hint="run git lfs pull")
    if size < 10 or length < 2 or length > size - 8:
        raise InputError(f"{path}: not a safetensors file (or cut short: it has {size} bytes)")
    if length > MAX_HEADER:
        raise InputError(f"{path}: a header of {length} bytes, more than the {MAX_HEADER} allowed")
    buffer = np.empty(length, np.uint8)
    read_into(path, 8, buffer)
    header = parse_json(buffer.tobytes(), path)
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise InputError(f"{path}: __metadata__ is not a map of strings to strings")
    tensors = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.spec.nbytes))
    _check_extent(path, tensors, 8 + length, size)
    return Header(metadata, tuple(tensors))


def _stored(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
            raise TypeError
        begin, end = offsets
        numbers = [*shape, begin, end]
        name.encode()  # half a surrogate pair is no text
        if not all(type(n) is int and 0 <= n < 2**64 for n in numbers):
            raise ValueError
        if len(shape) > 64 or any(n >= 2**64 for n in accumulate(shape, operator.mul)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: tensor {name!r}: its header entry is damaged") from None
    if dtype not in DTYPE_BITS:
        raise InputError(f"{path}: tensor {name!r}: unknown dtype {dtype!r}")
    if prod(shape) * DTYPE_BITS[dtype] != 8 * (end - begin):
        raise InputError(
            f"{path}: tensor {name!r}: {dtype} {shape} does not take the {end - begin} bytes given"
        )
    return StoredTensor(TensorSpec(name, dtype, tuple(shape)), path, data + begin)


def _check_extent(path: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    end = data
    for tensor in tensors:
        if tensor.offset != end:
            raise InputError(
                f"{path}: tensor {tensor.spec.name!r} starts at byte {tensor.offset},"
                f" the one before it ends at {end}"
            )
        end += tensor.spec.nbytes
    if end != size:
        what = "cut short" if size < end else "followed by other bytes"
        raise InputError(f"{path}: {what}: the header asks for {end} bytes, the file has {size}")
