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
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import FLOAT_DTYPES, Array, FloatArray, TensorSpec
from ptq_cli.errors import FileError, InputError, stated_in
from ptq_cli.formats import fused
from ptq_cli.formats.gguf import block_type
from ptq_cli.formats.gguf.metadata import model_metadata, tokenizer_metadata
from ptq_cli.models.family import text_config
from ptq_cli.models.gguf_keys import frequency_factors, hyperparameters
from ptq_cli.models.gguf_names import GgufNames, Placing, is_stack, names_of_file, names_of_model
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.files import listing, named, read_into
from ptq_cli.storage.gguf_file import GgufTensor, library, read_gguf_header, write_gguf
from ptq_cli.storage.gguf_placing import (
    Outgoing,
    Parts,
    check_stacks,
    dense,
    dense_type,
    outgoing,
    tensors_of,
    unplaced,
)
from ptq_cli.storage.tensors import NUMPY_DTYPES, Bytes, quantized_entry, quantized_metadata

NAME = "model.gguf"
_MAX_TOKENIZER = 256 << 20


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint: quantized tensors are U8 [out_features, bytes of a row], each
    expert's tensors are its own.

    placings: of tensors that stand in the file otherwise than in the checkpoint
    """

    placings: Mapping[str, Placing] = field(default_factory=dict)

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
    path: Path, root: Path | None, fmt: Format, names: GgufNames | None = None
) -> tuple[GgufCheckpoint, list[Layer]]:
    """Open a GGUF file of a known architecture.

    names: of its family, where that is known from elsewhere

    Raises:
        InputError: another architecture, or a tensor that is not understood.
    """
    header = read_gguf_header(path)
    _, own = quantized_entry(path, header.metadata) or ("", {})
    metadata = {**header.metadata, "ptq": own}
    architecture = str(metadata.get("general.architecture"))
    config = {
        "num_attention_heads": metadata.get(f"{architecture}.attention.head_count", 1),
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv"),
    }
    with stated_in(path):
        if names is None:
            names = names_of_file(architecture, f"{architecture}.expert_count" in metadata)
            names = names.called_as([f"{module}.weight" for module in own])
        found = dict(tensors_of(header, names))
        specs = {name: tensor.spec for name, tensor in found.items()}
        layers = fmt.layers(Contents(metadata, config, specs, lambda name: np.empty(0)))
        tensors, placings, transposed = {}, {}, set()
        for name, tensor in found.items():
            placing = names.placing(name, config)
            if placing.transposed and tensor.spec.dtype not in FLOAT_DTYPES:
                transposed.add(name)  # packed rows are those of the transposed matrix
                placing = replace(placing, transposed=False)
            if placing.heads is not None:
                _check_heads(tensor.spec, placing.heads)
            tensors[name] = StoredTensor(_seen(name, tensor, placing), path, tensor.offset)
            if replace(placing, exact=False) != Placing():
                placings[name] = placing
    opened = GgufCheckpoint(path, root, path, tensors, {}, placings=placings)
    return opened, [
        replace(layer, transposed=True, full_shape=layer.shape[::-1])
        if layer.tensor in transposed
        else layer
        for layer in layers
    ]


def _seen(name: str, tensor: GgufTensor, placing: Placing) -> TensorSpec:
    """A tensor as it is in a checkpoint."""
    spec = replace(tensor.spec, name=name)
    if spec.dtype not in FLOAT_DTYPES:
        return TensorSpec(name, "U8", (spec.shape[0], tensor.nbytes // spec.shape[0]))
    return replace(spec, shape=spec.shape[::-1]) if placing.transposed else spec


def _check_heads(spec: TensorSpec, heads: int) -> None:
    if not isinstance(heads, int) or heads < 1 or spec.shape[0] % (2 * heads):
        raise InputError(f"tensor {spec.name!r} {list(spec.shape)} does not hold {heads} heads")


def check_gguf(
    source: Checkpoint,
    layers: Sequence[Layer],
    skipped: Sequence[str],
    types: GgufTypes = ALL_TOLD,
) -> tuple[str, ...]:
    """Whatever could keep the file from being written, found before any work: raises InputError.
    Else a warning where a model has towers beside its text, which are no part of the file."""
    library()
    check_model(source, layers, skipped)
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
    kind = block_type(fused.commonest(layers).grid).name
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


def write_gguf_model(
    out: Path,
    parts: Parts,
    layers: Mapping[str, Layer],
    fmt: Format,
    source: Checkpoint,
    types: GgufTypes = ALL_TOLD,
) -> None:
    """Write model.gguf into `out`, then open it and compare every tensor with what was staged."""
    names, config = names_of_model(source.config), text_config(source.config)
    names = names.called_as([layer.tensor for layer in layers.values()])
    own: dict[str, Any] = dict(quantized_metadata(fmt, list(layers.values())))
    if types.file_type is not None:
        own["general.file_type"] = types.file_type
    tensors = outgoing(parts, layers, names, config, types.stored_as)
    factors = frequency_factors(names, config)
    specs = [
        (_stacked(name, stack), sum(p.nbytes for p in stack)) for name, stack in tensors.items()
    ]
    specs += [(TensorSpec(n, "F32", v.shape), v.nbytes) for n, v in factors.items()]

    def arrays() -> Iterator[Array]:
        for stack in tensors.values():
            yield stack[0].placed() if len(stack) == 1 else np.stack([p.placed() for p in stack])
        yield from factors.values()

    path = out / NAME
    write_gguf(
        path, names.architecture, _metadata(source, list(layers.values()), own), specs, arrays()
    )
    _verify(path, tensors, list(layers.values()), fmt, names)
    _verify_factors(path, factors)


def _stacked(name: str, stack: Sequence[Outgoing]) -> TensorSpec:
    spec = stack[0].spec
    experts = (len(stack),) if is_stack(name) else ()
    return TensorSpec(name, spec.dtype, (*experts, *spec.shape))


def _verify(
    path: Path,
    tensors: Mapping[str, Sequence[Outgoing]],
    layers: Sequence[Layer],
    fmt: Format,
    names: GgufNames,
) -> None:
    opened, found = open_gguf(path, None, fmt, names)
    written = [part for stack in tensors.values() for part in stack]
    same = set(map(_told_by_headers, found)) == set(map(_told_by_headers, layers))
    if not same or list(opened.tensors) != [part.spec.name for part in written]:
        raise FileError(f"{path}: does not hold the layers that were written")
    for part in written:
        if not np.array_equal(opened.read(part.spec.name), part.reads_as()):
            raise FileError(f"{path}: tensor {part.spec.name!r} reads back different")


def _verify_factors(path: Path, factors: Mapping[str, FloatArray]) -> None:
    found = {tensor.spec.name: tensor for tensor in read_gguf_header(path).tensors}
    for name, values in factors.items():
        back = np.empty_like(values)
        read_into(path, found[name].offset, back.view(np.uint8))
        if not np.array_equal(back, values):
            raise FileError(f"{path}: tensor {name!r} reads back different")


def _told_by_headers(layer: Layer) -> tuple[str, tuple[int, int], Grid]:
    """Scales and codes say the rest of a grid."""
    return layer.module, layer.shape, replace(layer.grid, narrow_range=False, mirrored=False)
