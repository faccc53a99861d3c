"""Experts that are stored as one tensor of all: seen one by one, and written as they were where
none of them is quantized."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ptq_cli.core.tensors import DTYPE_BITS
from ptq_cli.models.experts import Part, expert_parts
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor


def one_by_one(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a tensor for each expert's weight and bias, under the names that they
    have where experts are stored one by one."""
    parts = expert_parts(checkpoint.specs, checkpoint.config)
    tensors: dict[str, StoredTensor] = {}
    for name, stored in checkpoint.tensors.items():
        own = [_part(stored, part) for part in parts.get(name, ())]
        if any(tensor.spec.name in checkpoint.tensors for tensor in own):
            own = []  # they are there too: whoever wrote both knows which counts
        tensors |= {tensor.spec.name: tensor for tensor in own} if own else {name: stored}
    return checkpoint.holding(tensors)


def _part(stored: StoredTensor, part: Part) -> StoredTensor:
    itemsize = DTYPE_BITS[part.spec.dtype] // 8
    *_, inner = part.spec.shape
    in_order = part.strides in ((1,), (inner, 1))
    return StoredTensor(
        part.spec,
        stored.file,
        stored.offset + itemsize * part.offset,
        None if in_order else tuple(itemsize * stride for stride in part.strides),
        stored,
    )


def fused_again(
    tensors: Mapping[str, StoredTensor], fused: Collection[str]
) -> dict[str, StoredTensor]:
    """Tensors with the parts of these stored ones in one again."""
    whole: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if tensor.part_of is not None and tensor.part_of.spec.name in fused:
            whole[tensor.part_of.spec.name] = tensor.part_of
        else:
            whole[name] = tensor
    return whole


def left_fused(tensors: Mapping[str, StoredTensor], changed: Collection[str]) -> set[str]:
    """Stored tensors of all experts of which no part changes. Biases stay with their weights."""
    parts = {name: t.part_of.spec.name for name, t in tensors.items() if t.part_of is not None}
    split = {_weight_of(fused) for name, fused in parts.items() if name in changed}
    return {fused for fused in parts.values() if _weight_of(fused) not in split}


def _weight_of(fused: str) -> str:
    return fused.removesuffix(".weight").removesuffix("_bias")
