"""The tensors of a GGUF file as a checkpoint has them: one by one, by its names.

Of a family that is known here these are the names in its checkpoints, else those in the file; of
experts that the file holds as one tensor, each is a tensor of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.models.gguf_names import FREQUENCY_FACTORS, GgufNames, Placing, names_of_file
from ptq_cli.models.gguf_tensors import ARCHITECTURE, expert_name, holds_experts
from ptq_cli.storage.gguf_file import SCALES, GgufHeader, GgufTensor


@dataclass(frozen=True)
class GgufView:
    """names: of the family, None: tensors go by the names in the file
    tensors: by their names in the checkpoint, `spec.name` is that in the file
    placings: how they stand in the file, where that may be otherwise than in the checkpoint
    """

    header: GgufHeader
    names: GgufNames | None
    tensors: Mapping[str, GgufTensor]
    placings: Mapping[str, Placing]

    def heads(self, name: str) -> int | None:
        """Of a tensor whose rows the file orders otherwise in each head: how many."""
        placing = self.placings.get(name)
        return None if placing is None else placing.heads

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
    experts = bool(header.metadata.get(f"{architecture}.expert_count"))
    return view_by_names(header, names_of_file(architecture, experts))


def view_by_names(header: GgufHeader, names: GgufNames) -> GgufView:
    """By a family's names. Raises InputError where a tensor is not understood."""
    architecture = str(header.metadata.get(ARCHITECTURE))
    config = {
        "num_attention_heads": header.metadata.get(f"{architecture}.attention.head_count", 1),
        "num_key_value_heads": header.metadata.get(f"{architecture}.attention.head_count_kv"),
    }
    if not all(isinstance(value, int | None) for value in config.values()):
        raise InputError(f"{architecture}.attention.head_count is no number")
    tensors: dict[str, GgufTensor] = {}
    for tensor in header.tensors:
        own, shape = tensor.spec.name, tensor.spec.shape
        if own in FREQUENCY_FACTORS or own.endswith(SCALES):
            continue
        found = names.checkpoint_names(own, shape)
        if len(found) == 1 and len(shape) < 3:
            tensors[found[0]] = tensor
        elif len(shape) == 3 and shape[0] == len(found):
            tensors |= zip(found, _experts(tensor), strict=True)
        else:
            raise InputError(f"tensor {own!r} has shape {list(shape)}")
    placings = {name: names.placing(name, config) for name in tensors}
    for name, placing in placings.items():
        _check_heads(tensors[name].spec, placing.heads)
    return GgufView(header, names, tensors, placings)


def _check_heads(spec: TensorSpec, heads: int | None) -> None:
    if heads is not None and (heads < 1 or spec.shape[0] % (2 * heads)):
        raise InputError(f"tensor {spec.name!r} {list(spec.shape)} does not hold {heads} heads")


def _experts(tensor: GgufTensor) -> list[GgufTensor]:
    """The tensor of each expert, from that of all."""
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
        parts = _experts(tensor)
        tensors |= {expert_name(tensor.spec.name, i): part for i, part in enumerate(parts)}
    return GgufView(header, None, tensors, {})


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
