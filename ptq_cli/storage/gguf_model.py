"""A model as a GGUF file, written and proven (gguf_opened.py reads it back).

Matrices that are not quantized become F16 (F32 where that cannot hold them), vectors F32; q and k
of some families have their rows reordered inside each head, weights and biases alike. Of a model
that came as GGUF everything but the rounded matrices is copied: gguf_copy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import ALL_TOLD, GgufTypes, Layer
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Format
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, TensorSpec
from ptq_cli.errors import FileError, InputError
from ptq_cli.formats.gguf import block_type
from ptq_cli.formats.gguf.metadata import model_metadata, tokenizer_metadata
from ptq_cli.models.family import text_config
from ptq_cli.models.gguf_keys import frequency_factors, hyperparameters
from ptq_cli.models.gguf_names import GgufNames, is_stack, names_of_model
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import listing, named, read_into
from ptq_cli.storage.gguf_copy import check_copied, copied_keys, copied_tensors, file_type
from ptq_cli.storage.gguf_file import ALIGNMENT, read_gguf_header
from ptq_cli.storage.gguf_opened import open_gguf
from ptq_cli.storage.gguf_placing import (
    Outgoing,
    Parts,
    check_stacks,
    dense,
    dense_type,
    outgoing,
)
from ptq_cli.storage.gguf_write import Data, OutgoingTensor, encoded_keys, pieces_of, write_gguf
from ptq_cli.storage.tensors import quantized_metadata

_MAX_TOKENIZER = 256 << 20


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
        for name in types.stored_as:
            dense(name, source.read(name), types.stored_as[name])
        return ()
    names, config = names_of_model(source.config), text_config(source.config)
    for name in skipped:
        if name in source.tensors and not names.is_dropped(name):
            spec = source.tensors[name].spec
            if len(spec.shape) == 2 and spec.dtype != "F16":
                values = source.read(name)
                usual = dense_type(values, names.placing(name, config))
                dense(name, values, types.stored_as.get(name, usual))
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
    own_names, config = names_of_model(source.config), text_config(source.config)
    try:
        keys = hyperparameters(own_names, config)
        model = model_metadata(keys, own_names.architecture, name, kind)
        words = tokenizer_metadata({**source.config, **config}, tokenizer, settings)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
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


@dataclass(frozen=True)
class _Content:
    """What is written. tensors: each with what gives its data; names: of the family, None: tensors
    go by their names in the file; layers: as they are told when the file is opened so"""

    keys: Mapping[str, bytes]
    tensors: Sequence[tuple[OutgoingTensor, Callable[[], Data]]]
    names: GgufNames | None
    layers: Sequence[Layer]
    alignment: int = ALIGNMENT


def write_gguf_model(
    out: GgufOutput, parts: Parts, layers: Mapping[str, Layer], fmt: Format, source: Checkpoint
) -> None:
    """Write a GGUF file, then open it and compare every tensor with what was staged."""
    made = _copied if source.gguf is not None else _made
    content = made(out, parts, layers, fmt, source)
    tensors, data = zip(*content.tensors, strict=True)
    arrays = (give() for give in data)
    paths = write_gguf(out.path, content.keys, tensors, arrays, content.alignment, out.max_shard)
    _verify(paths[0], tensors, data, content.keys)
    _verify_layers(paths[0], content, fmt)


def _copied(
    out: GgufOutput, parts: Parts, layers: Mapping[str, Layer], fmt: Format, source: Checkpoint
) -> _Content:
    """Of a model that came as GGUF."""
    assert source.gguf is not None
    view, own = source.gguf, _own_keys(out, list(layers.values()), fmt)
    return _Content(
        copied_keys(view, layers, own),
        copied_tensors(source, parts, layers, out.types.stored_as),
        view.names,
        list(layers.values()),
        view.header.metadata.get("general.alignment", ALIGNMENT),
    )


def _made(
    out: GgufOutput, parts: Parts, layers: Mapping[str, Layer], fmt: Format, source: Checkpoint
) -> _Content:
    """Of a model with a config.json."""
    names, config = names_of_model(source.config), text_config(source.config)
    usual = [_usual(layer, names) for layer in layers.values()]
    metadata = _metadata(source, list(layers.values()), _own_keys(out, usual, fmt))
    tensors: list[tuple[OutgoingTensor, Callable[[], Data]]] = []
    for name, stack in outgoing(parts, layers, names, config, out.types.stored_as).items():
        size = sum(part.nbytes for part in stack)
        tensors.append((OutgoingTensor(_stacked(name, stack), size), partial(_placed, stack)))
    for name, values in frequency_factors(names, config).items():
        spec = TensorSpec(name, "F32", values.shape)
        tensors.append((OutgoingTensor(spec, values.nbytes), partial(_as_it_is, values)))
    return _Content(encoded_keys(metadata), tensors, names, usual)


def _own_keys(out: GgufOutput, layers: Sequence[Layer], fmt: Format) -> dict[str, Any]:
    own: dict[str, Any] = dict(quantized_metadata(fmt, layers, out.said))
    if out.types.file_type is not None:
        own["general.file_type"] = out.types.file_type
    return own


def _placed(stack: Sequence[Outgoing]) -> Data:
    return [part.placed() for part in stack]


def _as_it_is(values: Array) -> Data:
    return values


def _usual(layer: Layer, names: GgufNames) -> Layer:
    name = names.usual_name(layer.tensor)
    return replace(layer, module=name.removesuffix(".weight"), tensor=name)


def _stacked(name: str, stack: Sequence[Outgoing]) -> TensorSpec:
    spec = stack[0].spec
    experts = (len(stack),) if is_stack(name) else ()
    return TensorSpec(name, spec.dtype, (*experts, *spec.shape))


def _verify(
    path: Path,
    tensors: Sequence[OutgoingTensor],
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


def _verify_layers(path: Path, content: _Content, fmt: Format) -> None:
    """The layers are told from the file. (What was copied may be quantized, too.)"""
    _, found = open_gguf(path, None, fmt, content.names, by_file=content.names is None)
    if not set(map(_told_by_headers, content.layers)) <= set(map(_told_by_headers, found)):
        raise FileError(f"{path}: does not hold the layers that were written")


def _told_by_headers(layer: Layer) -> tuple[str, tuple[int, int], Grid]:
    """Scales and codes say the rest of a grid."""
    return layer.module, layer.shape, replace(layer.grid, narrow_range=False, mirrored=False)
