"""MXFP4 as gpt-oss has it: all experts of a block in one tensor.

    <experts>.gate_up_proj_blocks  U8 [experts, N, K / 32, 16]  two codes of E2M1 to a byte, the
                                                                lower first
    <experts>.gate_up_proj_scales  U8 [experts, N, K / 32]      exponents, 2^(byte − 127)

and so `down_proj`. The model's tensor is [experts, K, N]: inputs before outputs, gate and up taking
turns in the latter.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.levels import SMALL_FLOATS
from ptq_cli.core.plugins import Contents, PackedTensor, ReadOnlyLayout
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.formats.small_floats import e8m0_scales

_BLOCKS, _SCALES = "_blocks", "_scales"
_WIDTH = 32  # columns that share a scale


def _tensors(contents: Contents) -> tuple[PackedTensor, ...]:
    names = [
        name.removesuffix(_BLOCKS)
        for name, spec in contents.specs.items()
        if name.endswith(_BLOCKS) and spec.dtype == "U8"
    ]
    if not any(f"{name}{_SCALES}" in contents.specs for name in names):
        return ()
    return tuple(_tensor(name, contents) for name in names)


def _tensor(name: str, contents: Contents) -> PackedTensor:
    blocks = common.tensor(contents.specs, f"{name}{_BLOCKS}", 4)
    experts, rows, groups, size = blocks.shape
    if size != _WIDTH // 2:
        raise InputError(
            f"tensor {blocks.name!r} is {list(blocks.shape)}; MXFP4 has {_WIDTH // 2} bytes to a"
            " block"
        )
    scales = TensorSpec(f"{name}{_SCALES}", "U8", blocks.shape[:3])
    common.check_specs(contents.specs, [scales], f"{blocks.name} {list(blocks.shape)}")
    shape = (experts, groups * _WIDTH, rows)
    return PackedTensor(name, shape, {"blocks": blocks.name, "scales": scales.name}, entries=True)


def _decode(packed: PackedTensor, parts: Mapping[str, Array]) -> NDArray[np.float32]:
    blocks, table = parts["blocks"], SMALL_FLOATS["e2m1"].values
    scales = e8m0_scales(packed.parts["scales"], parts["scales"]).astype(np.float32)
    values = np.empty((*blocks.shape, 2), np.float32)
    values[..., 0] = table[blocks & 15]
    values[..., 1] = table[blocks >> 4]
    values *= scales[..., None, None]
    rows = values.reshape(*blocks.shape[:2], -1)
    return rows.transpose(0, 2, 1)


LAYOUT = ReadOnlyLayout("mxfp4", _tensors, _decode)
