"""A GGUF file as the model that it was made from: names, shapes, config.json and the tokenizer as
transformers has them.

Floats are seen in the dtype they are stored in, quantized tensors as BF16. They are decoded when
they are read, `matrix` gives them unrounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, FloatArray, TensorSpec
from ptq_cli.errors import InputError, stated_in
from ptq_cli.formats.gguf import unpermute_rows
from ptq_cli.formats.gguf.config import model_config
from ptq_cli.formats.gguf.tokenizer import tokenizer_documents, unread
from ptq_cli.formats.gguf.types import TYPES, BlockType
from ptq_cli.formats.gguf.unpack import check_blocks, unpack
from ptq_cli.models.gguf_names import GgufNames, names_of_file
from ptq_cli.storage.checkpoint import Checkpoint, Rows, StoredTensor
from ptq_cli.storage.digest import digest_of
from ptq_cli.storage.files import listing, read_into
from ptq_cli.storage.gguf_file import SCALES, GgufHeader, GgufTensor, read_gguf_header
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes, as_bytes

SEEN_AS = "BF16"  # quantized tensors
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufPlace:
    """How a tensor lies in the file that is seen otherwise.

    heads: its rows are reordered inside each of so many; scale: what its values are multiplied by
    """

    tensor: GgufTensor
    heads: int | None = None
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
    model folder"""

    places: Mapping[str, GgufPlace] = field(kw_only=True)
    settings: Mapping[str, Any] = field(kw_only=True)

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
            read_into(self.weights, place.scale.offset, scale.view(np.uint8))
        kind, data = TYPES[place.tensor.spec.dtype], self._in_order(place)
        with stated_in(self.weights):
            check_blocks(kind, name, data)
        return _Rows(data, kind, scale[0])

    def _in_order(self, place: GgufPlace) -> NDArray[np.uint8]:
        """Bytes of the file, [rows, bytes of a row], in the order that is seen."""
        data = np.empty(place.tensor.nbytes, np.uint8)
        read_into(self.weights, place.tensor.offset, data)
        rows = data.reshape(place.tensor.spec.shape[0], -1)
        return rows if place.heads is None else unpermute_rows(rows, place.heads)

    def read(self, name: str) -> Array:
        place, spec = self.places.get(name), self.tensors[name].spec
        if place is None:
            return super().read(name)
        if not place.packed:
            return self._in_order(place).view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)
        rows, columns = spec.shape
        return self.rows(name, (rows, columns))[:].astype(NUMPY_DTYPES[SEEN_AS])

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
        return self.holding({name: self.tensors[name] for name in names})


def open_gguf_source(path: Path, root: Path | None = None) -> GgufSource:
    """Open a GGUF file of a known architecture.

    root: the folder that the user named; its config.json goes before what the file says

    Raises:
        InputError: another architecture, a setting or a tensor that is not understood.
    """
    header = read_gguf_header(path)
    whole = root is not None and "config.json" in listing(root)
    with stated_in(path):
        names = names_of_file(str(header.metadata.get("general.architecture")))
        found = _named(header, names)
        settings = _settings(path, header, names, found)
        places = _places(header, names, found, settings)
    tensors = {
        name: StoredTensor(_seen(name, tensor), path, tensor.offset)
        for name, tensor in found.items()
    }
    why = None if whole else unread(header.metadata)
    warnings = () if why is None else (f"{path}: its tokenizer is left out: {why}",)
    return GgufSource(
        root or path, root if whole else None, path, tensors, {}, warnings,
        places=places, settings=settings,
    )  # fmt: skip


def _named(header: GgufHeader, names: GgufNames) -> dict[str, GgufTensor]:
    """The model's tensors by their names in a checkpoint."""
    return {
        f"{names.module_of(own)}.{own.rpartition('.')[2]}": tensor
        for tensor in header.tensors
        if (own := tensor.spec.name) != _ROPE_FACTORS and not own.endswith(SCALES)
    }


def _settings(
    path: Path, header: GgufHeader, names: GgufNames, found: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    """What config.json would be."""
    factors: FloatArray | None = None
    for tensor in header.tensors:
        if tensor.spec.name == _ROPE_FACTORS and tensor.spec.dtype == "F32":
            factors = np.empty(tensor.spec.shape, np.float32)
            read_into(path, tensor.offset, factors.view(np.uint8))
    sizes = [t.spec.shape[0] for t in found.values() if t.spec.name == "token_embd.weight"]
    if not sizes:
        raise InputError("tensor 'token_embd.weight' is missing")
    settings = model_config(header.metadata, names.model_type, sizes[0], factors)
    return settings | names.told_by_tensors(found, settings["num_hidden_layers"])


def _places(
    header: GgufHeader,
    names: GgufNames,
    found: Mapping[str, GgufTensor],
    settings: Mapping[str, Any],
) -> dict[str, GgufPlace]:
    """Of tensors that are quantized or reordered. Raises InputError for what cannot be decoded."""
    by_name = {tensor.spec.name: tensor for tensor in header.tensors}
    places = {}
    for name, tensor in found.items():
        module, spec = name.rpartition(".")[0], tensor.spec
        heads = names.permuted_heads(module, settings)
        if heads is not None and spec.shape[0] % (2 * heads):
            raise InputError(f"tensor {spec.name!r} {list(spec.shape)} does not hold {heads} heads")
        scale = by_name.get(f"{spec.name.removesuffix('.weight')}.scale")
        place = GgufPlace(tensor, heads, scale)
        if place.packed:
            _check_packed(place)
        if place.packed or heads is not None:
            places[name] = place
    return places


def _check_packed(place: GgufPlace) -> None:
    """Raises InputError for a quantized tensor that cannot be decoded."""
    spec, scale = place.tensor.spec, place.scale
    if len(spec.shape) != 2:
        raise InputError(f"tensor {spec.name!r} of type {spec.dtype} has shape {list(spec.shape)}")
    if scale is not None and (scale.spec.dtype, scale.spec.shape) != ("F32", (1,)):
        stated = f"{scale.spec.dtype} {list(scale.spec.shape)}"
        raise InputError(f"tensor {scale.spec.name!r} is {stated}, not F32 [1]")


def _seen(name: str, tensor: GgufTensor) -> TensorSpec:
    dtype = tensor.spec.dtype
    return replace(tensor.spec, name=name, dtype=dtype if dtype in FLOAT_DTYPES else SEEN_AS)
