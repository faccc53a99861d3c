"""The types in a GGUF file: how many tensors have which, and which of llama.cpp's mixes it is.

Nothing is asked but the header, so that files of any architecture can be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ptq_cli.plan.mixes import MIXES, is_rounded, mix_types
from ptq_cli.plan.tensor_types import facts_of_metadata
from ptq_cli.storage.gguf_file import GgufHeader

_FLOATS = {0: "F32", 1: "F16", 32: "BF16"}  # general.file_type of files that are not quantized
_NAMES = _FLOATS | {mix.file_type: name for name, mix in MIXES.items()}


def file_types(header: GgufHeader) -> dict[str, Any]:
    """Of a GGUF file: `types` (type → `tensors`, `bytes`), `bits_per_weight` of all of them,
    `file_type` (general.file_type, or None) with its name as `stated`, `mixes` whose types all
    tensors have, and `differing`: name → [its type, that of the mix] of one that `nearest` names:
    that whose types all tensors have, or that is stated, or from which the fewest differ."""
    types: dict[str, dict[str, int]] = {}
    for tensor in header.tensors:
        entry = types.setdefault(tensor.spec.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    weights = sum(prod(tensor.spec.shape) for tensor in header.tensors)
    stored = sum(tensor.nbytes for tensor in header.tensors)
    number = header.metadata.get("general.file_type")
    stated = _NAMES.get(number) if isinstance(number, int) else None
    return {
        "types": dict(sorted(types.items(), key=lambda entry: -entry[1]["bytes"])),
        "bits_per_weight": 8 * stored / weights if weights else None,
        "file_type": number,
        "stated": stated,
        **_mix(header, stated),
    }


def _mix(header: GgufHeader, stated: str | None) -> dict[str, Any]:
    """Which mixes fit, and what differs from one of them."""
    shapes = {tensor.spec.name: tensor.spec.shape for tensor in header.tensors}
    found = {
        tensor.spec.name: tensor.spec.dtype
        for tensor in header.tensors
        if is_rounded(tensor.spec.name, tensor.spec.shape)
    }
    if stated in _FLOATS.values() and set(found.values()) <= {*_FLOATS.values()}:
        return {"mixes": [], "nearest": None, "differing": {}}
    differing = {name: _differing(name, header.metadata, shapes, found) for name in MIXES}
    nearest = min(differing, key=lambda name: (len(differing[name]), name != stated))
    if stated in differing and differing[nearest]:
        nearest = stated
    return {
        "mixes": [name for name, own in differing.items() if not own],
        "nearest": nearest,
        "differing": differing[nearest],
    }


def _differing(
    mix: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, str],
) -> dict[str, list[str]]:
    """Tensors that have other types than in a mix, however it may have been made: knowing which
    inputs matter or not, pure or not."""
    ways = [
        mix_types(mix, facts_of_metadata(metadata, important), shapes, pure)
        for important in (False, True)
        for pure in (False, True)
    ]
    differing = [
        {name: [kind, way[name]] for name, kind in found.items() if way[name] != kind}
        for way in ways
    ]
    return min(differing, key=len)
