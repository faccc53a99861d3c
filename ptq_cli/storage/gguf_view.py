"""The tensors of a GGUF file as a checkpoint has them: one by one, by its names.

Of a family that is known here these are the names in its checkpoints, else those in the file; of
experts that the file holds as one tensor, each is a tensor of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ptq_cli.errors import InputError
from ptq_cli.models.gguf_names import (
    FREQUENCY_FACTORS,
    GgufNames,
    Placing,
    is_stack,
    names_of_file,
)
from ptq_cli.models.gguf_tensors import ARCHITECTURE, expert_name, holds_experts
from ptq_cli.storage.gguf_file import SCALES, GgufHeader, GgufTensor


@dataclass(frozen=True)
class GgufView:
    """names: of the family, None: tensors go by the names in the file
    tensors: by their names in the checkpoint, `spec.name` is that in the file
    placings: of the tensors that stand in the file otherwise than in a checkpoint
    """

    header: GgufHeader
    names: GgufNames | None
    tensors: Mapping[str, GgufTensor]
    placings: Mapping[str, Placing] = field(default_factory=dict)

    def placing(self, name: str) -> Placing:
        """How a tensor stands in the file."""
        return self.placings.get(name, Placing())

    def members(self) -> dict[str, list[str]]:
        """Each tensor of the file → its own name in the checkpoint, or that of each expert."""
        found: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            found.setdefault(tensor.spec.name, []).append(name)
        return found

    def scale_of(self, name: str) -> GgufTensor | None:
        """What the values of a tensor are multiplied by, where it has that: F32 [1].

        Raises:
            InputError: it has another type or shape.
        """
        stored = self.tensors[name].spec.name
        scale = self._scales.get(f"{stored.removesuffix('.weight')}.scale")
        if scale is None:
            return None
        if scale.spec.dtype == "F32" and scale.spec.shape == (1,):
            return scale
        own = self.members()[stored]
        if len(own) > 1 and (scale.spec.dtype, scale.spec.shape) == ("F32", (len(own),)):
            return replace(scale, offset=scale.offset + 4 * own.index(name), nbytes=4)
        stated = f"{scale.spec.dtype} {list(scale.spec.shape)}"
        raise InputError(f"tensor {scale.spec.name!r} is {stated}, not F32 [1]")

    @cached_property
    def _scales(self) -> dict[str, GgufTensor]:
        return {t.spec.name: t for t in self.header.tensors if t.spec.name.endswith(".scale")}

    def changed(self, files: Mapping[str, Path]) -> list[str]:
        """Of a checkpoint's tensors those that lie elsewhere than in the file. files: of each"""
        return [name for name, file in files.items() if file not in self.header.files]

    @property
    def digest(self) -> str:
        """SHA-256 of the key-values."""
        digest = hashlib.sha256()
        for key in self.header.places:
            digest.update(repr(key).encode())
            digest.update(self.header.encoded(key))
        return digest.hexdigest()


def view_by_family(header: GgufHeader) -> GgufView:
    """By the names of the architecture's family. Raises InputError where it is not known, or a
    tensor is not understood."""
    architecture = str(header.metadata.get(ARCHITECTURE))
    experts, windows = (
        header.metadata.get(f"{architecture}.{key}", 0) != 0
        for key in ("expert_count", "attention.sliding_window")
    )
    return view_by_names(header, names_of_file(architecture, experts, windows))


def view_by_names(header: GgufHeader, names: GgufNames) -> GgufView:
    """By these names. Raises InputError where a tensor is not understood."""
    tensors: dict[str, GgufTensor] = {}
    for tensor in header.tensors:
        own = tensor.spec.name
        if own not in FREQUENCY_FACTORS and not own.endswith(SCALES):
            found = names.checkpoint_names(own, tensor.spec.shape)
            parts = _parts(tensor) if is_stack(own) else [tensor]
            tensors |= zip(found, parts, strict=True)
    config = _head_counts(header)
    placings = {name: names.placing(name, config) for name in tensors}
    for name, placing in placings.items():
        spec, heads = tensors[name].spec, placing.heads
        if heads is not None and (heads < 1 or spec.shape[0] % (2 * heads)):
            raise InputError(f"tensor {spec.name!r} {list(spec.shape)} does not hold {heads} heads")
    return GgufView(header, names, tensors, placings)


def _head_counts(header: GgufHeader) -> dict[str, int]:
    """What config.json says of heads. Raises InputError where it is no number."""
    architecture = str(header.metadata.get(ARCHITECTURE))
    heads = header.metadata.get(f"{architecture}.attention.head_count", 1)
    key_heads = header.metadata.get(f"{architecture}.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        raise InputError(f"{architecture}.attention.head_count is no number")
    return {"num_attention_heads": heads, "num_key_value_heads": key_heads}


def _parts(tensor: GgufTensor) -> list[GgufTensor]:
    """The experts of a tensor of all."""
    count, *shape = tensor.spec.shape
    size, spec = tensor.nbytes // count, replace(tensor.spec, shape=tuple(shape))
    return [
        replace(tensor, spec=spec, offset=tensor.offset + number * size, nbytes=size)
        for number in range(count)
    ]


def view_by_file(header: GgufHeader) -> GgufView:
    """By the names in the file, experts one by one."""
    tensors: dict[str, GgufTensor] = {}
    for tensor in header.tensors:
        if tensor.spec.name.endswith(SCALES):
            continue
        if not holds_experts(tensor.spec):
            tensors[tensor.spec.name] = tensor
            continue
        for number, part in enumerate(_parts(tensor)):
            tensors[expert_name(tensor.spec.name, number)] = part
    return GgufView(header, None, tensors)


def view_of(header: GgufHeader) -> GgufView:
    """By the family's names where all tensors have one, else by those in the file."""
    try:
        return view_by_family(header)
    except InputError:
        return view_by_file(header)


def scaled_away(view: GgufView, written: Collection[str]) -> set[str]:
    """Tensors of the file that belong to the blocks of others, of which these are written anew."""
    own = {view.tensors[name].spec.name.removesuffix(".weight") for name in written}
    return {f"{name}{ending}" for name in own for ending in SCALES}
