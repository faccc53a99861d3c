"""Which tensors are linears that are quantized unless one says otherwise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

from ptq_cli.core.layer import Skipped
from ptq_cli.core.tensors import FLOAT_DTYPES, TensorSpec, is_float

_LEFT_ALONE = (
    ("embedding", re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)(\.|$)", re.IGNORECASE)),
    ("norm", re.compile(r"(^|\.)(\w*norm\w*|ln_\w+|ln\d*)(\.|$)", re.IGNORECASE)),
    ("output head", re.compile(r"(^|\.)lm_head(\.|$)|^(output|embed_out|score)(\.|$)")),
)


_EMBEDDING = _LEFT_ALONE[0][1]


def default_reason(spec: TensorSpec) -> str | None:
    """Why a tensor is left alone unless asked for, or None where it is quantized."""
    if not is_float(spec):
        return f"dtype {spec.dtype}"
    if prod(spec.shape) == 0:
        return "empty"
    if len(spec.shape) != 2:
        return f"rank {len(spec.shape)}"
    for kind, pattern in _LEFT_ALONE:
        if pattern.search(spec.name.removesuffix(".weight")):
            return kind
    return None if spec.name.endswith(".weight") else "not a .weight"


def dense_modules(skipped: Sequence[Skipped]) -> list[str]:
    """Linears that are left in floating point: runtimes want them declared."""
    return [
        entry.tensor.removesuffix(".weight")
        for entry in skipped
        if entry.tensor.endswith(".weight")
        and len(entry.shape) == 2
        and entry.dtype in FLOAT_DTYPES
        and not _EMBEDDING.search(entry.tensor.removesuffix(".weight"))
    ]
