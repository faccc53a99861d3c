"""A model as a GGUF file: names, types and row order on the way out and back.

Matrices that are not quantized become F16 (F32 where that cannot hold them), vectors F32; q and k
of some families have their rows reordered inside each head, weights and biases alike. What is read
back has the checkpoint's names and order. Of a model that came as GGUF everything but the rounded
matrices is copied: storage/gguf_copy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import ALL_TOLD, GgufTypes, Layer
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, TensorSpec
from ptq_cli.errors import FileError, InputError, stated_in
from ptq_cli.formats.gguf import block_type, permute_rows, unpermute_rows
from ptq_cli.formats.gguf.metadata import model_metadata, tokenizer_metadata
from ptq_cli.models.gguf_names import names_of_model
from ptq_cli.numerics.scales import LEAST_SCALES, SCALE_LIMITS
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.files import listing, named, read_into
from ptq_cli.storage.gguf_copy import cast, check_copied, copied_keys, copied_tensors, file_type
from ptq_cli.storage.gguf_file import ALIGNMENT, read_gguf_header
from ptq_cli.storage.gguf_view import view_of
from ptq_cli.storage.gguf_write import Data, Outgoing, encoded_keys, pieces_of, write_gguf
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes, quantized_entry, quantized_metadata

_DROPPED = ".rotary_emb.inv_freq"  # computed anew by every loader
_MAX_TOKENIZER = 256 << 20

Parts = Sequence[tuple[str, Sequence[Bytes]]]


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint: quantized tensors are U8 [out_features, bytes of a row].

    heads: tensors whose rows are reordered in the file, with the number of heads
    scaled: quantized tensors whose values another tensor multiplies
    """

    heads: Mapping[str, int] = field(default_factory=dict)
    scaled: Sequence[str] = ()

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        data = super().read_bytes(name)
        if name not in self.heads:
            return data
        rows = data.reshape(self.tensors[name].spec.shape[0], -1)
        return np.ascontiguousarray(unpermute_rows(rows, self.heads[name])).reshape(-1)

    def copyable(self, name: str) -> StoredTensor | Bytes:
        stored = self.tensors[name]
        return Bytes(stored.spec, self.read_bytes(name)) if name in self.heads else stored


def open_gguf(path: Path, root: Path | None, fmt: Format) -> tuple[GgufCheckpoint, list[Layer]]:
    """Open a GGUF file; of an architecture that is not known here, tensors have the names in the
    file. Raises InputError."""
    header = read_gguf_header(path)
    _, own = quantized_entry(path, header.metadata) or ("", {})
    view = view_of(header)
    with stated_in(path):
        # a block's own name is GGUF's, whatever it is called in the checkpoint
        specs = {name: tensor.spec for name, tensor in view.tensors.items()}
        matrices = {n: s for n, s in specs.items() if s.dtype in FLOAT_DTYPES or len(s.shape) == 2}
        metadata = {**header.metadata, "ptq": own}
        layers = fmt.layers(Contents(metadata, {}, matrices, lambda name: np.empty(0)))
        scaled = [layer.tensor for layer in layers if view.scale_of(layer.tensor) is not None]
    tensors = {}
    for name, tensor in view.tensors.items():
        spec = replace(tensor.spec, name=name)
        if spec.dtype not in FLOAT_DTYPES:
            rows = prod(spec.shape[:-1])
            spec = TensorSpec(name, "U8", (rows, tensor.nbytes // rows))
        tensors[name] = StoredTensor(spec, tensor.file, tensor.offset)
    opened = GgufCheckpoint(path, root, path, tensors, {}, heads=view.heads, scaled=scaled)
    return opened, list(layers)


def check_gguf(
    source: Checkpoint,
    layers: Sequence[Layer],
    dense: Sequence[str],
    types: GgufTypes = ALL_TOLD,
) -> None:
    """Whatever could keep the file from being written, found before any work. Raises InputError."""
    check_model(source, layers, dense)
    if source.gguf is not None:
        dense = [name for name in dense if name in types.stored_as]
    for name in dense:
        if name in source.tensors and not name.endswith(_DROPPED):
            spec = source.tensors[name].spec
            if len(spec.shape) == 2 and spec.dtype != "F16":
                _dense(name, source.read(name), types.stored_as.get(name))


def check_model(source: Checkpoint, layers: Sequence[Layer], dense: Sequence[str]) -> None:
    """What has no place in a GGUF file by config.json, the tokenizer, names and headers. Raises
    InputError."""
    if source.gguf is not None:
        check_copied(source.gguf, layers)
        return
    _metadata(source, layers, {})
    names = names_of_model(source.config)
    for layer in layers:
        names.tensor_name(layer.tensor)
    for name in dense:
        if name.endswith(_DROPPED):
            continue
        names.tensor_name(name)
        if name not in source.tensors:
            continue
        spec = source.tensors[name].spec
        if spec.dtype not in FLOAT_DTYPES or len(spec.shape) > 2:
            raise InputError(f"tensor {name!r} {spec.dtype} has no place in a GGUF file")


def _metadata(
    source: Checkpoint, layers: Sequence[Layer], own: Mapping[str, Any]
) -> dict[str, Any]:
    if not source.config:
        raise InputError(
            f"{source.path}: gguf needs the model's config.json",
            hint="name the model folder, or another --format",
        )
    names = () if source.documents else listing(source.folder)
    tokenizer = source.document("tokenizer.json", _MAX_TOKENIZER)
    settings = dict(source.document("tokenizer_config.json") or {})
    if tokenizer is None and "tokenizer.model" in names:
        raise InputError(
            f"{source.folder}: gguf takes the tokenizer from tokenizer.json, not tokenizer.model",
            hint="save the tokenizer with transformers once",
        )
    if "chat_template.jinja" in names:
        with named(source.folder / "chat_template.jinja"):
            template = (source.folder / "chat_template.jinja").read_text("utf-8")
        settings = {"chat_template": template, **settings}
    kind = file_type(layers)
    name = (source.root or source.folder).resolve().name
    architecture = names_of_model(source.config).architecture
    try:
        model = model_metadata(source.config, architecture, name, kind)
        words = tokenizer_metadata(source.config, tokenizer, settings)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{source.folder}: gguf: config.json or the tokenizer lacks or garbles {error}"
        ) from None
    return {**model, **words, **own}


def _dense(name: str, values: Array, kind: str | None = None) -> Array:
    """A tensor in the type that it gets; kind: that which was asked for. Raises InputError where a
    value does not fit."""
    return cast(name, values, kind or _dense_type(values))


def _dense_type(values: Array) -> str:
    """F16 for a matrix, but F32 where float16 has no digits for one of its rows; F32 for vectors.

    values: the tensor as it is stored
    """
    if values.ndim != 2 or values.dtype == np.float16:
        return "F16" if values.ndim == 2 else "F32"
    with np.errstate(over="ignore"):
        largest = np.abs(values).max(axis=1, initial=0).astype(np.float32)
    small = (largest > 0) & (largest < LEAST_SCALES["float16"])
    return "F32" if small.any() or (largest > SCALE_LIMITS["float16"][1]).any() else "F16"


def _outgoing(
    parts: Parts, layers: Mapping[str, Layer], stored_as: Mapping[str, str]
) -> Iterator[tuple[TensorSpec, Bytes]]:
    """Each tensor that is written: its name in the checkpoint, ggml type and shape, and its bytes
    as they are staged."""
    for name, tensors in parts:
        for tensor in tensors:
            if name in layers:
                kind = block_type(layers[name].grid).name
                yield TensorSpec(tensor.spec.name, kind, layers[name].shape), tensor
            elif not name.endswith(_DROPPED):
                kind = stored_as.get(name) or _dense_type(_stored_values(tensor))
                yield replace(tensor.spec, dtype=kind), tensor


@dataclass(frozen=True)
class GgufOutput:
    """Where a model is written, and what is said of it.

    path: the file, or what those of several are named by; max_shard: bytes of tensors in one
    said: what the key `ptq` says beside the layers; types: what the layers do not tell
    """

    path: Path
    max_shard: int | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    types: GgufTypes = ALL_TOLD


def write_gguf_model(
    out: GgufOutput, parts: Parts, layers: Mapping[str, Layer], fmt: Format, source: Checkpoint
) -> None:
    """Write a GGUF file, then open it and compare every tensor with what was staged."""
    own: dict[str, Any] = dict(quantized_metadata(fmt, list(layers.values()), out.said))
    if out.types.file_type is not None:
        own["general.file_type"] = out.types.file_type
    if source.gguf is not None:
        keys = copied_keys(source.gguf, layers, own)
        tensors, data = copied_tensors(source, parts, layers, out.types.stored_as)
        alignment = source.gguf.header.metadata.get("general.alignment", ALIGNMENT)
    else:
        keys = encoded_keys(_metadata(source, list(layers.values()), own))
        tensors, data = _made_tensors(source, parts, layers, out.types.stored_as)
        alignment = ALIGNMENT
    written = write_gguf(out.path, keys, tensors, map(_read, data), alignment, out.max_shard)
    _verify(written[0], tensors, data, keys)
    _verify_layers(written[0], layers, fmt)


def _made_tensors(
    source: Checkpoint, parts: Parts, layers: Mapping[str, Layer], stored_as: Mapping[str, str]
) -> tuple[list[Outgoing], list[Callable[[], Data]]]:
    """What is written of a checkpoint: GGUF's names and types, and what gives the data."""
    names = names_of_model(source.config)
    tensors: list[Outgoing] = []
    data: list[Callable[[], Data]] = []
    for spec, tensor in _outgoing(parts, layers, stored_as):
        nbytes = spec.nbytes if spec.dtype in FLOAT_DTYPES else tensor.spec.nbytes
        tensors.append(Outgoing(replace(spec, name=names.tensor_name(spec.name)), nbytes))
        heads = names.permuted_heads(spec.name.rpartition(".")[0], source.config)
        data.append(partial(_in_order, spec, tensor, heads))
    return tensors, data


def _in_order(spec: TensorSpec, tensor: Bytes, heads: int | None) -> Array:
    values = _values(spec, tensor)
    return values if heads is None else permute_rows(values, heads)


def _read(data: Callable[[], Data]) -> Data:
    return data()


def _values(spec: TensorSpec, tensor: Bytes) -> Array:
    """Packed rows as bytes, dense tensors in the type they get."""
    values = _stored_values(tensor)
    return values if tensor.spec.dtype == "U8" else _dense(spec.name, values, spec.dtype)


def _stored_values(tensor: Bytes) -> Array:
    return tensor.data.view(NUMPY_DTYPES[tensor.spec.dtype]).reshape(tensor.spec.shape)


def _verify(
    path: Path,
    tensors: Sequence[Outgoing],
    data: Sequence[Callable[[], Data]],
    keys: Mapping[str, bytes],
) -> None:
    """Raises FileError where the file does not hold what was to be written."""
    header = read_gguf_header(path)
    if any(header.encoded(key) != value for key, value in keys.items()):
        raise FileError(f"{path}: its key-values read back different")
    if [(tensor.spec, tensor.nbytes) for tensor in header.tensors] != [
        (tensor.spec, tensor.nbytes) for tensor in tensors
    ]:
        raise FileError(f"{path}: does not hold the tensors that were written")
    for tensor, own in zip(header.tensors, data, strict=True):
        place = tensor.offset
        for piece in pieces_of(own()):
            back = np.empty(len(piece), np.uint8)
            read_into(tensor.file, place, back)
            place += len(piece)
            if not np.array_equal(back, piece):
                raise FileError(f"{path}: tensor {tensor.spec.name!r} reads back different")


def _verify_layers(path: Path, layers: Mapping[str, Layer], fmt: Format) -> None:
    """The layers are told from the file. (What was copied may be quantized, too.)"""
    _, found = open_gguf(path, None, fmt)
    if not set(map(_told_by_headers, layers.values())) <= set(map(_told_by_headers, found)):
        raise FileError(f"{path}: does not hold the layers that were written")


def _told_by_headers(layer: Layer) -> tuple[str, tuple[int, int], Grid]:
    """Scales and codes say the rest of a grid."""
    return layer.module, layer.shape, replace(layer.grid, narrow_range=False, mirrored=False)
