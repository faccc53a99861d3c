"""A model as one GGUF file: names, types and row order on the way out and back.

Matrices that are not quantized become F16 (F32 where that cannot hold them), vectors F32; q and k
of some families have their rows reordered inside each head, weights and biases alike. What is read
back has the checkpoint's names and order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import ALL_TOLD, GgufTypes, Layer
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, TensorSpec
from ptq_cli.errors import FileError, InputError, stated_in
from ptq_cli.formats import fused
from ptq_cli.formats.gguf import block_type, permute_rows, unpermute_rows
from ptq_cli.formats.gguf.metadata import model_metadata, tokenizer_metadata
from ptq_cli.models.gguf_names import names_of_file, names_of_model
from ptq_cli.numerics.scales import LEAST_SCALES, SCALE_LIMITS
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.files import listing, named
from ptq_cli.storage.gguf_file import library, read_gguf_header, write_gguf
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes, quantized_entry, quantized_metadata

NAME = "model.gguf"
_DROPPED = ".rotary_emb.inv_freq"  # computed anew by every loader
_MAX_TOKENIZER = 256 << 20

Parts = Sequence[tuple[str, Sequence[Bytes]]]


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint: quantized tensors are U8 [out_features, bytes of a row].

    heads: tensors whose rows are reordered in the file, with the number of heads
    """

    heads: Mapping[str, int] = field(default_factory=dict)

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
    """Open a GGUF file of a known architecture. Raises InputError."""
    header = read_gguf_header(path)
    _, own = quantized_entry(path, header.metadata) or ("", {})
    metadata = {**header.metadata, "ptq": own}
    architecture = str(metadata.get("general.architecture"))
    config = {
        "num_attention_heads": metadata.get(f"{architecture}.attention.head_count", 1),
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv"),
    }
    with stated_in(path):
        names = names_of_file(architecture)
        found = {
            f"{names.module_of(tensor.spec.name)}.{tensor.spec.name.rpartition('.')[2]}": tensor
            for tensor in header.tensors
        }
        specs = {name: tensor.spec for name, tensor in found.items()}
        layers = fmt.layers(Contents(metadata, config, specs, lambda name: np.empty(0)))
        tensors, heads = {}, {}
        for name, tensor in found.items():
            spec, rows = replace(tensor.spec, name=name), tensor.spec.shape[0]
            if spec.dtype not in FLOAT_DTYPES:
                spec = TensorSpec(name, "U8", (rows, tensor.nbytes // rows))
            tensors[name] = StoredTensor(spec, path, tensor.offset)
            count = names.permuted_heads(name.rpartition(".")[0], config)
            if count is not None:
                heads[name] = count
                _check_heads(tensor.spec, count)
    return GgufCheckpoint(path, root, path, tensors, {}, heads=heads), list(layers)


def _check_heads(spec: TensorSpec, heads: int) -> None:
    if not isinstance(heads, int) or heads < 1 or spec.shape[0] % (2 * heads):
        raise InputError(f"tensor {spec.name!r} {list(spec.shape)} does not hold {heads} heads")


def check_gguf(
    source: Checkpoint,
    layers: Sequence[Layer],
    dense: Sequence[str],
    types: GgufTypes = ALL_TOLD,
) -> None:
    """Whatever could keep the file from being written, found before any work. Raises InputError."""
    library()
    check_model(source, layers, dense)
    for name in dense:
        if name in source.tensors and not name.endswith(_DROPPED):
            spec = source.tensors[name].spec
            if len(spec.shape) == 2 and spec.dtype != "F16":
                _dense(name, source.read(name), types.stored_as.get(name))


def check_model(source: Checkpoint, layers: Sequence[Layer], dense: Sequence[str]) -> None:
    """What has no place in a GGUF file by config.json, the tokenizer, names and headers. Raises
    InputError."""
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
    kind = block_type(fused.commonest(layers).grid).name
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
    kind = kind or _dense_type(values)
    with np.errstate(over="ignore"):
        result: Array = values.astype(NUMPY_DTYPES[kind])
    if not np.isfinite(result).all():
        raise InputError(
            f"tensor {name!r} holds values that {kind} cannot", hint=f"--include {name}"
        )
    return result


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


def write_gguf_model(
    out: Path,
    parts: Parts,
    layers: Mapping[str, Layer],
    fmt: Format,
    source: Checkpoint,
    types: GgufTypes = ALL_TOLD,
) -> None:
    """Write model.gguf into `out`, then open it and compare every tensor with what was staged."""
    names = names_of_model(source.config)
    own: dict[str, Any] = dict(quantized_metadata(fmt, list(layers.values())))
    if types.file_type is not None:
        own["general.file_type"] = types.file_type
    outgoing = list(_outgoing(parts, layers, types.stored_as))
    specs = [
        (
            replace(spec, name=names.tensor_name(spec.name)),
            spec.nbytes if spec.dtype in FLOAT_DTYPES else tensor.spec.nbytes,
        )
        for spec, tensor in outgoing
    ]

    def in_order(spec: TensorSpec, tensor: Bytes) -> Array:
        heads = names.permuted_heads(spec.name.rpartition(".")[0], source.config)
        values = _values(spec, tensor)
        return values if heads is None else permute_rows(values, heads)

    path = out / NAME
    metadata = _metadata(source, list(layers.values()), own)
    arrays = (in_order(spec, tensor) for spec, tensor in outgoing)
    write_gguf(path, names.architecture, metadata, specs, arrays)
    _verify(path, outgoing, layers, fmt)


def _values(spec: TensorSpec, tensor: Bytes) -> Array:
    """Packed rows as bytes, dense tensors in the type they get."""
    values = _stored_values(tensor)
    return values if tensor.spec.dtype == "U8" else _dense(spec.name, values, spec.dtype)


def _stored_values(tensor: Bytes) -> Array:
    return tensor.data.view(NUMPY_DTYPES[tensor.spec.dtype]).reshape(tensor.spec.shape)


def _verify(
    path: Path,
    outgoing: Sequence[tuple[TensorSpec, Bytes]],
    layers: Mapping[str, Layer],
    fmt: Format,
) -> None:
    opened, found = open_gguf(path, None, fmt)
    same = set(map(_told_by_headers, found)) == set(map(_told_by_headers, layers.values()))
    if not same or list(opened.tensors) != [spec.name for spec, _ in outgoing]:
        raise FileError(f"{path}: does not hold the layers that were written")
    for spec, tensor in outgoing:
        if not np.array_equal(opened.read(spec.name), _values(spec, tensor)):
            raise FileError(f"{path}: tensor {spec.name!r} reads back different")


def _told_by_headers(layer: Layer) -> tuple[str, tuple[int, int], Grid]:
    """Scales and codes say the rest of a grid."""
    return layer.module, layer.shape, replace(layer.grid, narrow_range=False, mirrored=False)
