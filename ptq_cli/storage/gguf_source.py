"""A GGUF file as the model that it was made from: names, shapes, config.json and the tokenizer as
transformers has them. Of an architecture that is not known here tensors have the names in the file.

Floats are seen in the dtype they are stored in, quantized tensors as BF16. They are decoded when
they are read, `matrix` gives them unrounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, FloatArray, TensorSpec
from ptq_cli.errors import InputError, stated_in
from ptq_cli.formats.gguf import unpermute_rows
from ptq_cli.formats.gguf.tokenizer import tokenizer_documents, unread
from ptq_cli.formats.gguf.types import TYPES, BlockType
from ptq_cli.formats.gguf.unpack import check_blocks, unpack
from ptq_cli.models.gguf_config import check_shapes, model_config
from ptq_cli.models.gguf_names import FREQUENCY_FACTORS, Placing
from ptq_cli.models.gguf_tensors import ARCHITECTURE
from ptq_cli.storage.checkpoint import Checkpoint, Rows, StoredTensor
from ptq_cli.storage.digest import digest_of
from ptq_cli.storage.files import listing, read_into
from ptq_cli.storage.gguf_file import GgufTensor, read_gguf_header
from ptq_cli.storage.gguf_placing import unplaced
from ptq_cli.storage.gguf_view import GgufView, view_by_family, view_of
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes, as_bytes

SEEN_AS = "BF16"  # quantized tensors


@dataclass(frozen=True)
class GgufPlace:
    """How a tensor lies in the file that is seen otherwise.

    scale: what its values are multiplied by
    """

    tensor: GgufTensor
    placing: Placing = field(default_factory=Placing)
    scale: GgufTensor | None = None

    @property
    def packed(self) -> bool:
        return self.tensor.spec.dtype not in FLOAT_DTYPES


@dataclass(frozen=True)
class _Rows:
    """The rows of a quantized tensor, decoded as they are asked for: float32 [rows, columns].

    data: uint8 [rows, bytes of a row], in the order that is seen
    """

    data: NDArray[np.uint8]
    kind: BlockType
    scale: np.float32

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        values = unpack(self.kind, self.data[rows]).dequantized()
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asked looks for NaN and inf
            return values if self.scale == 1 else values * self.scale


@dataclass(frozen=True)
class GgufSource(Checkpoint):
    """places: of tensors that are quantized or reordered; settings: what `config` is without a
    model folder; view: of the whole file, None in a part of it"""

    places: Mapping[str, GgufPlace] = field(kw_only=True)
    settings: Mapping[str, Any] = field(kw_only=True)
    view: GgufView | None = field(kw_only=True)

    @property
    def gguf(self) -> GgufView | None:
        return self.view

    @property
    def stem(self) -> str:
        return self.weights.name.removesuffix(".gguf")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return self.settings if self.root is None else super().config

    @cached_property
    def documents(self) -> Mapping[str, Any]:
        if self.root is not None:
            return {}
        if "model_type" not in self.settings:
            return {}
        tokenizer = tokenizer_documents(read_gguf_header(self.weights).metadata)
        return {"config.json": self.settings, **tokenizer}

    @property
    def origin(self) -> str | None:
        kinds = {place.tensor.spec.dtype for place in self.places.values() if place.packed}
        return f"GGUF, {', '.join(sorted(kinds))}" if kinds else None

    def is_decoded(self, name: str) -> bool:
        return name in self.places and self.places[name].packed

    def extent(self, name: str) -> int:
        place = self.places.get(name)
        return super().extent(name) if place is None else place.tensor.nbytes

    def rows(self, name: str, shape: tuple[int, int]) -> Rows:
        place = self.places.get(name)
        if place is None or not place.packed:
            return super().rows(name, shape)
        scale = np.ones(1, np.float32)
        if place.scale is not None:
            read_into(place.scale.file, place.scale.offset, scale.view(np.uint8))
        kind, data = TYPES[place.tensor.spec.dtype], self._in_order(place)
        with stated_in(place.tensor.file):
            check_blocks(kind, name, data)
        rows = _Rows(data, kind, scale[0])
        return rows[:].T if place.placing.transposed else rows

    def _in_order(self, place: GgufPlace) -> NDArray[np.uint8]:
        """Bytes of the file, [rows, bytes of a row], in the order that is seen."""
        data = np.empty(place.tensor.nbytes, np.uint8)
        read_into(place.tensor.file, place.tensor.offset, data)
        shape = place.tensor.spec.shape
        if place.placing.heads is None:
            return data.reshape(prod(shape[:-1]), -1)
        return unpermute_rows(data.reshape(shape[0], -1), place.placing.heads)

    def read(self, name: str) -> Array:
        place, spec = self.places.get(name), self.tensors[name].spec
        if place is None:
            return super().read(name)
        if not place.packed:
            stored = place.tensor.spec
            values = self._in_order(place).view(NUMPY_DTYPES[stored.dtype]).reshape(stored.shape)
            return np.ascontiguousarray(unplaced(values, replace(place.placing, heads=None)))
        matrix = self.rows(name, (prod(spec.shape[:-1]), spec.shape[-1]))[:].reshape(spec.shape)
        values = matrix - np.float32(1) if place.placing.plus_one else matrix
        return values.astype(NUMPY_DTYPES[spec.dtype])

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        if name not in self.places:
            return super().read_bytes(name)
        return as_bytes(name, self.read(name)).data

    def digest(self, name: str) -> str:
        place = self.places.get(name)
        return super().digest(name) if place is None else digest_of(self._in_order(place).ravel())

    def copyable(self, name: str) -> StoredTensor | Bytes:
        if name not in self.places:
            return super().copyable(name)
        return Bytes(self.tensors[name].spec, self.read_bytes(name))

    def streams(self, layer: Layer) -> bool:
        return layer.tensor not in self.places and super().streams(layer)

    def holding(self, tensors: Mapping[str, StoredTensor]) -> GgufSource:
        """The same checkpoint, seen as these tensors; those that are others lie elsewhere."""
        same = [name for name in self.places if tensors.get(name) is self.tensors[name]]
        places = {name: self.places[name] for name in same}
        return replace(self, tensors=tensors, places=places)

    def part(self, names: Iterable[str]) -> GgufSource:
        return replace(self.holding({name: self.tensors[name] for name in names}), view=None)


def open_gguf_source(
    path: Path, root: Path | None = None, *, any_architecture: bool = False
) -> GgufSource:
    """Open a GGUF file, the first of several that hold a model.

    root: the folder that the user named; its config.json goes before what the file says
    any_architecture: what the file says of its model need not be understood; `config` is then
        without its settings

    Raises:
        InputError: another architecture, a setting or a tensor that is not understood.
    """
    header = read_gguf_header(path)
    whole = root is not None and "config.json" in listing(root)
    with stated_in(path):
        view = view_of(header) if any_architecture else view_by_family(header)
        settings = _settings(view, any_architecture)
        places = _places(view)
    why = None if whole or "model_type" not in settings else unread(header.metadata)
    warnings = () if why is None else (f"{path}: its tokenizer is left out: {why}",)
    return GgufSource(
        root or path, root if whole else None, path, _tensors(view), {}, warnings,
        places=places, settings=settings, view=view,
    )  # fmt: skip


def _tensors(view: GgufView) -> dict[str, StoredTensor]:
    """The tensors as they are seen; by the names in the file, experts are parts of the tensor of
    all. A checkpoint of a known family has them one by one, as if it had been stored so."""
    whole = {
        tensor.spec.name: StoredTensor(
            _seen(tensor.spec.name, tensor, Placing()), tensor.file, tensor.offset
        )
        for tensor in view.header.tensors
    }
    seen = {}
    for name, tensor in view.tensors.items():
        of = whole[tensor.spec.name]
        is_part = view.names is None and len(tensor.spec.shape) < len(of.spec.shape)
        spec = _seen(name, tensor, view.placing(name))
        part_of = of if is_part else None
        seen[name] = StoredTensor(spec, tensor.file, tensor.offset, part_of=part_of)
    return seen


def _settings(view: GgufView, any_architecture: bool) -> dict[str, Any]:
    """What config.json would be; where it cannot be known, and need not be, the architecture alone
    (of names that are those of a checkpoint not even that)."""
    if view.names is None:
        return {ARCHITECTURE: view.header.metadata.get(ARCHITECTURE)}
    try:
        return _config(view)
    except InputError:
        if any_architecture:
            return {}
        raise


def _config(view: GgufView) -> dict[str, Any]:
    found = view.tensors
    sizes = [t.spec.shape[0] for t in found.values() if t.spec.name == "token_embd.weight"]
    if not sizes:
        raise InputError("tensor 'token_embd.weight' is missing")
    assert view.names is not None
    factors = _frequency_factors(view)
    settings = model_config(view.names, view.header.metadata, sizes[0], factors)
    family = view.names.family.settings(settings)
    blocks, experts = family["num_hidden_layers"], family.get("num_experts") or 0
    for key, count, parts in (("block_count", blocks, 1), ("expert_count", experts, blocks)):
        if count * parts > len(found):  # told before so many names are made
            raise InputError(f"{key} is {count}, but there are {len(found)} tensors")
    shapes = {tensor.spec.name: tensor.spec.shape for tensor in view.header.tensors}
    check_shapes(view.names, settings, shapes)
    return settings | view.names.told_by_tensors(found, blocks, experts)


def _frequency_factors(view: GgufView) -> dict[str, FloatArray]:
    found = {}
    for tensor in view.header.tensors:
        if tensor.spec.name in FREQUENCY_FACTORS and tensor.spec.dtype == "F32":
            values = np.empty(tensor.spec.shape, np.float32)
            read_into(tensor.file, tensor.offset, values.reshape(-1).view(np.uint8))
            found[tensor.spec.name] = values
    return found


def _places(view: GgufView) -> dict[str, GgufPlace]:
    """Of tensors that stand otherwise in the file. Raises InputError for what cannot be decoded."""
    places = {}
    for name, tensor in view.tensors.items():
        place = GgufPlace(tensor, view.placing(name), view.scale_of(name))
        if place.packed or place.placing.changes:
            places[name] = place
    return places


def _seen(name: str, tensor: GgufTensor, placing: Placing) -> TensorSpec:
    dtype = tensor.spec.dtype if tensor.spec.dtype in FLOAT_DTYPES else SEEN_AS
    if placing.plus_one:
        dtype = "F32"  # gain − 1 has more digits
    shape = tensor.spec.shape[::-1] if placing.transposed else tensor.spec.shape
    return TensorSpec(name, dtype, shape)
