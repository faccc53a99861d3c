"""A quantized GGUF file, opened: its tensors with the checkpoint's names and order, its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import FLOAT_DTYPES, TensorSpec
from ptq_cli.errors import stated_in
from ptq_cli.models.gguf_names import GgufNames, Placing
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.gguf_file import GgufHeader, GgufTensor, read_gguf_header
from ptq_cli.storage.gguf_placing import unplaced
from ptq_cli.storage.gguf_view import GgufView, view_by_file, view_by_names, view_of
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes, quantized_entry


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint: quantized tensors are U8 [out_features, bytes of a row], each
    expert's tensors are its own.

    placings: of tensors that stand in the file otherwise than in the checkpoint
    scaled: quantized tensors whose values another tensor multiplies
    """

    placings: Mapping[str, Placing] = field(default_factory=dict)
    scaled: Sequence[str] = ()

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        data, spec = super().read_bytes(name), self.tensors[name].spec
        if name not in self.placings:
            return data
        placing = self.placings[name]
        shape = spec.shape[::-1] if placing.transposed else spec.shape
        values = data.view(NUMPY_DTYPES[spec.dtype]).reshape(shape)
        return np.ascontiguousarray(unplaced(values, placing)).reshape(-1).view(np.uint8)

    def copyable(self, name: str) -> StoredTensor | Bytes:
        stored = self.tensors[name]
        return Bytes(stored.spec, self.read_bytes(name)) if name in self.placings else stored


def open_gguf(
    path: Path,
    root: Path | None,
    fmt: Format,
    names: GgufNames | None = None,
    *,
    by_file: bool = False,
) -> tuple[GgufCheckpoint, list[Layer]]:
    """Open a GGUF file. Of an architecture that is not known here, and with `by_file`, tensors have
    the names in the file.

    names: of its family, where that is known from elsewhere

    Raises:
        InputError: a damaged file.
    """
    header = read_gguf_header(path)
    _, own = quantized_entry(path, header.metadata) or ("", {})
    with stated_in(path):
        view = _view(header, names, by_file)
        specs = {name: tensor.spec for name, tensor in view.tensors.items()}
        matrices = {n: s for n, s in specs.items() if s.dtype in FLOAT_DTYPES or len(s.shape) == 2}
        metadata = {**header.metadata, "ptq": own}
        layers = fmt.layers(Contents(metadata, {}, matrices, lambda name: np.empty(0)))
        scaled = [layer.tensor for layer in layers if view.scale_of(layer.tensor) is not None]
    tensors, placings, transposed = {}, {}, set()
    for name, tensor in view.tensors.items():
        placing = view.placings.get(name, Placing())
        if placing.transposed and tensor.spec.dtype not in FLOAT_DTYPES:
            transposed.add(name)  # packed rows are those of the transposed matrix
            placing = replace(placing, transposed=False)
        tensors[name] = StoredTensor(_seen(name, tensor, placing), tensor.file, tensor.offset)
        if replace(placing, exact=False) != Placing():
            placings[name] = placing
    opened = GgufCheckpoint(path, root, path, tensors, {}, placings=placings, scaled=scaled)
    return opened, [
        replace(layer, transposed=True, full_shape=layer.shape[::-1])
        if layer.tensor in transposed
        else layer
        for layer in layers
    ]


def _view(header: GgufHeader, names: GgufNames | None, by_file: bool) -> GgufView:
    if by_file:
        return view_by_file(header)
    return view_of(header) if names is None else view_by_names(header, names)


def _seen(name: str, tensor: GgufTensor, placing: Placing) -> TensorSpec:
    """A tensor as it is in a checkpoint."""
    spec = replace(tensor.spec, name=name)
    if spec.dtype not in FLOAT_DTYPES:
        rows = prod(spec.shape[:-1])
        return TensorSpec(name, "U8", (rows, tensor.nbytes // rows))
    return replace(spec, shape=spec.shape[::-1]) if placing.transposed else spec
