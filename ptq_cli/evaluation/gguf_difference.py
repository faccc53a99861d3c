"""What is different in two GGUF files of one model: types, sizes, key-values, and how far the
values of a tensor are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from ptq_cli.core.names import by_number
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.evaluation.file_types import file_types
from ptq_cli.storage.gguf_file import GgufHeader, GgufTensor, read_gguf_header
from ptq_cli.storage.gguf_values import values_of

_SHOWN = 60  # characters of a key's value


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same in both files.

    before, after: its type and bytes there
    rel_diff: ‖after − before‖² / ‖before‖² of its values, 0 where only the types differ
    """

    tensor: str
    before: tuple[str, int]
    after: tuple[str, int]
    rel_diff: float


@dataclass(frozen=True)
class GgufDifference:
    """before, after: what file_types.py says of each
    keys: key → its values, as words; added, removed: tensors of one file only
    tensors: those that differ, the farthest first
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    keys: Mapping[str, tuple[str | None, str | None]]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]

    @property
    def same(self) -> bool:
        return not (self.keys or self.added or self.removed or self.tensors)


def gguf_difference(before: Path, after: Path) -> GgufDifference:
    """Compare two files.

    Raises:
        InputError: a tensor has another shape: they are not of one model.
    """
    headers = read_gguf_header(before), read_gguf_header(after)
    first, second = ({t.spec.name: t for t in header.tensors} for header in headers)
    both = [name for name in by_number(first) if name in second]
    for name in both:
        _check_shapes(before, first[name].spec, after, second[name].spec)
    found = [_compared(first[name], second[name]) for name in both]
    differing = [entry for entry in found if entry.rel_diff or entry.before[0] != entry.after[0]]
    return GgufDifference(
        before=file_types(headers[0]),
        after=file_types(headers[1]),
        keys=_keys(*headers),
        added=tuple(name for name in by_number(second) if name not in first),
        removed=tuple(name for name in by_number(first) if name not in second),
        tensors=tuple(sorted(differing, key=lambda entry: -entry.rel_diff)),
    )


def _check_shapes(before: Path, first: TensorSpec, after: Path, second: TensorSpec) -> None:
    if first.shape != second.shape:
        raise InputError(
            f"{before} and {after} are not of one model: tensor {first.name!r} is"
            f" {list(first.shape)} and {list(second.shape)}"
        )


def _compared(first: GgufTensor, second: GgufTensor) -> TensorDifference:
    difference, size = 0.0, 0.0
    for ours, theirs in zip(values_of(first), values_of(second), strict=True):
        difference += float(np.square(theirs - ours, dtype=np.float64).sum())
        size += float(np.square(ours, dtype=np.float64).sum())
    rel_diff = difference / size if size else (inf if difference else 0.0)
    sides = [(tensor.spec.dtype, tensor.nbytes) for tensor in (first, second)]
    return TensorDifference(first.spec.name, sides[0], sides[1], rel_diff)


def _keys(first: GgufHeader, second: GgufHeader) -> dict[str, tuple[str | None, str | None]]:
    """Keys whose values differ, this tool's own aside."""
    names = dict.fromkeys([*first.metadata, *second.metadata])
    sides = {name: [h.metadata.get(name) for h in (first, second)] for name in names}
    return {
        name: (_word(one), _word(other))
        for name, (one, other) in sides.items()
        if one != other and name != "ptq"
    }


def _word(value: Any) -> str | None:
    if value is None or not isinstance(value, list):
        return None if value is None else str(value)[:_SHOWN]
    return f"{len(value)} values"
