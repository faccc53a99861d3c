"""The two sides of an evaluation: the original, folded as the quantized folder says, and that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptq_cli.calibration.source import SmoothedSource, Source, smoothed_source
from ptq_cli.errors import InputError
from ptq_cli.numerics.activations import ActivationSettings
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.experts import fused_again
from ptq_cli.storage.folded import folded_checkpoint, folds_between
from ptq_cli.storage.folder import container_of
from ptq_cli.storage.quantized import QuantizedFolder


@dataclass(frozen=True)
class Sides:
    """The original and what was quantized.

    smoothed: the original with the folds of the quantized folder, which are those of
        `folds_between`
    source, smoothed_source: statistics of the inputs of the original, and of that
    activations: how inputs are rounded to integers too, or None
    """

    original: Checkpoint
    quantized: QuantizedFolder
    smoothed: Checkpoint
    source: Source | None
    smoothed_source: SmoothedSource | None
    activations: ActivationSettings | None = None


def open_sides(
    original: Checkpoint,
    quantized: QuantizedFolder,
    source: Source | None,
    activations: ActivationSettings | None = None,
) -> Sides:
    """Fold the original as the quantized folder says.

    activations: of what has statistics

    Raises:
        InputError: the two do not belong together.
    """
    check_same_model(original, quantized)
    folds = folds_between(original.folder, quantized.checkpoint.folder)
    for site, _ in folds:
        absent = [name for name in site.tensors if name not in original.tensors]
        if absent:
            raise InputError(f"{original.path}: no tensor {absent[0]!r}, which was smoothed")
    smoothed = folded_checkpoint(original, folds)
    behind = None if source is None else smoothed_source(source, folds)
    return Sides(original, quantized, smoothed, source, behind, activations)


def check_same_model(original: Checkpoint, quantized: QuantizedFolder) -> None:
    """Raises InputError where a layer's tensor is missing in the original, or has another shape."""
    for layer in quantized.layers.values():
        stored = original.tensors.get(layer.tensor)
        if stored is None:
            raise InputError(
                f"{original.path}: no tensor {layer.tensor!r}, which"
                f" {quantized.checkpoint.path} was quantized from"
            )
        if stored.spec.shape != layer.full_shape:
            raise InputError(
                f"{original.path}: tensor {layer.tensor!r} is {list(stored.spec.shape)}, in"
                f" {quantized.checkpoint.path} it is {list(layer.full_shape)}"
            )


def _same_tensor(name: str, original: Checkpoint, quantized: QuantizedFolder) -> bool:
    """Byte for byte, or after the cast that the container made."""
    first, second = original.tensors[name].spec, quantized.checkpoint.tensors[name].spec
    if container_of(quantized.fmt).filled or first.dtype == second.dtype:
        return first == second and np.array_equal(
            original.read_bytes(name), quantized.checkpoint.read_bytes(name)
        )
    ours, theirs = original.read(name), quantized.checkpoint.read(name)
    with np.errstate(over="ignore"):
        return np.array_equal(ours.astype(theirs.dtype), theirs)


def compare_untouched(
    original: Checkpoint, quantized: QuantizedFolder
) -> tuple[list[str], list[str]]:
    """Of the tensors that are no part of a quantized layer: with other bytes than the original,
    and the original's that are missing."""
    taken = {layer.tensor for layer in quantized.layers.values()}
    untouched = sorted(quantized.untouched())
    # experts that came as one tensor of all are there so, or one by one
    original = original.holding(fused_again(original.tensors, untouched))
    different = [
        name
        for name in untouched
        if name not in original.tensors or not _same_tensor(name, original, quantized)
    ]
    return different, sorted(original.tensors.keys() - taken - set(untouched))
