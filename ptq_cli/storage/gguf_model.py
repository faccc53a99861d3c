"""A model as a GGUF file: names, types and row order on the way out and back.

How tensors stand there is told in storage/gguf_placing.py. What is read back has the checkpoint's
names and order. Of a model that came as GGUF everything but the rounded matrices is copied:
storage/gguf_copy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import ALL_TOLD, GgufTypes, Layer
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import FLOAT_DTYPES, TensorSpec
from ptq_cli.errors import FileError, InputError, stated_in
from ptq_cli.formats.gguf import block_type
from ptq_cli.formats.gguf.metadata import model_metadata, tokenizer_metadata
from ptq_cli.models.family import text_config
from ptq_cli.models.gguf_keys import hyperparameters
from ptq_cli.models.gguf_names import Placing, names_of_model
from ptq_cli.models.gguf_tensors import ARCHITECTURE
from ptq_cli.storage.chat import chat_templates
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.files import listing, read_into
from ptq_cli.storage.gguf_copy import check_copied, copied_keys, copied_tensors, file_type
from ptq_cli.storage.gguf_file import ALIGNMENT, GgufHeader, GgufTensor, read_gguf_header
from ptq_cli.storage.gguf_placing import (
    Parts,
    cast,
    check_stacks,
    dense_type,
    made_tensors,
    unplaced,
)
from ptq_cli.storage.gguf_view import GgufView, view_by_names, view_of
from ptq_cli.storage.gguf_write import (
    Data,
    Outgoing,
    encoded_keys,
    gguf_size,
    pieces_of,
    write_gguf,
)
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes, quantized_entry, quantized_metadata

_MAX_TOKENIZER = 256 << 20


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
    path: Path, root: Path | None, fmt: Format, config: Mapping[str, Any] | None = None
) -> tuple[GgufCheckpoint, list[Layer]]:
    """Open a GGUF file; of an architecture that is not known here, tensors have the names in the
    file.

    config: the model's config.json where there is one: it tells more families

    Raises:
        InputError: a damaged file, or blocks of a type that is not understood.
    """
    header = read_gguf_header(path)
    _, own = quantized_entry(path, header.metadata) or ("", {})
    view = _view(header, config or {}, [f"{module}.weight" for module in own])
    with stated_in(path):
        # a block's own name is GGUF's, whatever it is called in the checkpoint
        specs = {name: tensor.spec for name, tensor in view.tensors.items()}
        matrices = {n: s for n, s in specs.items() if s.dtype in FLOAT_DTYPES or _is_linear(n, s)}
        metadata = {**header.metadata, "ptq": own}
        layers = fmt.layers(Contents(metadata, {}, matrices, lambda name: np.empty(0)))
        scaled = [layer.tensor for layer in layers if view.scale_of(layer.tensor) is not None]
    placings = {name: place for name, place in view.placings.items() if place.changes}
    packed = {layer.tensor: placings.get(layer.tensor, Placing()) for layer in layers}
    # packed rows are those of the transposed matrix already
    placings |= {name: replace(p, transposed=False) for name, p in packed.items() if p.changes}
    tensors = {
        name: StoredTensor(_seen(name, tensor, placings), tensor.file, tensor.offset)
        for name, tensor in view.tensors.items()
    }
    opened = GgufCheckpoint(path, root, path, tensors, {}, placings=placings, scaled=scaled)
    return opened, [
        replace(layer, transposed=True, full_shape=layer.shape[::-1])
        if packed[layer.tensor].transposed
        else layer
        for layer in layers
    ]


def _is_linear(name: str, spec: TensorSpec) -> bool:
    return len(spec.shape) == 2 and name.endswith(".weight")


def _view(header: GgufHeader, config: Mapping[str, Any], names: Sequence[str]) -> GgufView:
    """By the names of the family that config.json names, where it is that of the file and all
    tensors have one. names: of some tensors, for families that have several"""
    try:
        family = names_of_model(config)
        if family.architecture == header.metadata.get(ARCHITECTURE):
            return view_by_names(header, family.called_as(names))
    except InputError:
        pass
    return view_of(header)


def _seen(name: str, tensor: GgufTensor, placings: Mapping[str, Placing]) -> TensorSpec:
    spec = replace(tensor.spec, name=name)
    if spec.dtype not in FLOAT_DTYPES:
        rows = prod(spec.shape[:-1])
        return TensorSpec(name, "U8", (rows, tensor.nbytes // rows))
    turned = name in placings and placings[name].transposed
    return replace(spec, shape=spec.shape[::-1]) if turned else spec


def check_gguf(
    source: Checkpoint,
    layers: Sequence[Layer],
    skipped: Sequence[str],
    types: GgufTypes = ALL_TOLD,
) -> tuple[str, ...]:
    """Whatever could keep the file from being written, found before any work: raises InputError.
    Else a warning where a model has towers beside its text, which are no part of the file."""
    check_model(source, layers, skipped)
    if source.gguf is not None:
        for name in [name for name in skipped if name in types.stored_as]:
            if name in source.tensors and len(source.tensors[name].spec.shape) == 2:
                cast(name, source.read(name), types.stored_as[name])
        return ()
    names, config = names_of_model(source.config), text_config(source.config)
    for name in skipped:
        if name in source.tensors and not names.is_dropped(name):
            spec = source.tensors[name].spec
            if len(spec.shape) == 2 and spec.dtype != "F16":
                values, placing = source.read(name), names.placing(name, config)
                cast(name, values, types.stored_as.get(name) or dense_type(values, placing))
    left = fold_names([name for name in skipped if names.in_a_tower(name)])
    return (f"not in the GGUF file, which holds the text model: {left}",) if left else ()


def check_model(source: Checkpoint, layers: Sequence[Layer], dense: Sequence[str]) -> None:
    """What has no place in a GGUF file by config.json, the tokenizer, names and headers. Raises
    InputError."""
    if source.gguf is not None:
        check_copied(source.gguf, layers)
        return
    _metadata(source, layers, {})
    names = names_of_model(source.config)
    kinds = {layer.tensor: block_type(layer.grid).name for layer in layers}
    for name in dense:
        if names.is_dropped(name):
            continue
        kinds[name] = "floats"
        if name not in source.tensors:
            continue
        spec = source.tensors[name].spec
        if spec.dtype not in FLOAT_DTYPES or len(spec.shape) > 2:
            raise InputError(f"tensor {name!r} {spec.dtype} has no place in a GGUF file")
    check_stacks(names, kinds)
    for name in kinds:
        heads = names.placing(name, text_config(source.config)).heads
        shape = source.specs[name].shape if name in source.specs else (0,)
        if heads is not None and (heads < 1 or shape[0] % (2 * heads)):
            raise InputError(f"tensor {name!r} {list(shape)} does not hold {heads} heads")


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
    if "default" in (templates := chat_templates(source)):
        _, settings["chat_template"] = templates["default"]
    kind = file_type(layers)
    name = (source.root or source.folder).resolve().name
    own_names, config = names_of_model(source.config), text_config(source.config)
    try:
        keys = hyperparameters(own_names, config)
        model = model_metadata(keys, own_names.architecture, name, kind)
        words = tokenizer_metadata({**source.config, **config}, tokenizer, settings)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{source.folder}: gguf: config.json or the tokenizer lacks or garbles {error}"
        ) from None
    return {**model, **words, **own}


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
    keys, tensors, data, alignment = _contents(out, parts, layers, fmt, source)
    written = write_gguf(out.path, keys, tensors, map(_read, data), alignment, out.max_shard)
    _verify(written[0], tensors, data, keys)
    _verify_layers(written[0], layers, fmt, source.config)


def gguf_model_size(
    out: GgufOutput, parts: Parts, layers: Mapping[str, Layer], fmt: Format, source: Checkpoint
) -> int:
    """Bytes of the files that `write_gguf_model` would write. parts: of layers without values"""
    keys, tensors, _, alignment = _contents(out, parts, layers, fmt, source)
    return gguf_size(keys, tensors, alignment, out.max_shard)


def _contents(
    out: GgufOutput, parts: Parts, layers: Mapping[str, Layer], fmt: Format, source: Checkpoint
) -> tuple[dict[str, bytes], list[Outgoing], list[Callable[[], Data]], int]:
    """Of the file: keys, tensors, what gives their data, and the alignment."""
    own: dict[str, Any] = dict(quantized_metadata(fmt, list(layers.values()), out.said))
    if out.types.file_type is not None:
        own["general.file_type"] = out.types.file_type
    if source.gguf is not None:
        keys = copied_keys(source.gguf, layers, own)
        tensors, data = copied_tensors(source, parts, layers, out.types.stored_as)
        return keys, tensors, data, source.gguf.header.metadata.get("general.alignment", ALIGNMENT)
    keys = encoded_keys(_metadata(source, list(layers.values()), own))
    tensors, data = made_tensors(source, parts, layers, out.types.stored_as)
    return keys, tensors, data, ALIGNMENT


def _read(data: Callable[[], Data]) -> Data:
    return data()


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


def _verify_layers(
    path: Path, layers: Mapping[str, Layer], fmt: Format, config: Mapping[str, Any]
) -> None:
    """The layers are told from the file. (What was copied may be quantized, too.)"""
    _, found = open_gguf(path, None, fmt, config)
    if not set(map(_told_by_headers, layers.values())) <= set(map(_told_by_headers, found)):
        raise FileError(f"{path}: does not hold the layers that were written")


def _told_by_headers(layer: Layer) -> tuple[str, tuple[int, int], Grid]:
    """Scales and codes say the rest of a grid."""
    return layer.module, layer.shape, replace(layer.grid, narrow_range=False, mirrored=False)
