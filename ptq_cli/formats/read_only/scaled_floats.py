"""FP8 and FP4 with scales, as Model Optimizer, FBGEMM and DeepSeek-V4 name them.

Per linear `<module>`, with out_features N, in_features K:

    <module>.weight          F8_E4M3 [N, K], or U8 or I8 [N, K / 2]: two codes of E2M1 to a byte,
                             the lower first
    <module>.weight_scale    Model Optimizer and FBGEMM; DeepSeek-V4: <module>.scale
    <module>.weight_scale_2  F32, one number; Model Optimizer's NVFP4

A scale is one number, or there is one for each row, [N] or [N, 1]; for 32 columns of a row (16 with
a `weight_scale_2`); or for each block of config.json's `weight_block_size`. It is F32, BF16, F16
or F8_E4M3; F8_E8M0 or U8 is an exponent. `weight ≈ (weight_scale · weight_scale_2) · code`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.levels import SMALL_FLOATS
from ptq_cli.core.plugins import Contents, PackedTensor, ReadOnlyLayout
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.formats.small_floats import e4m3_scales, e8m0_scales, fp8_codes, is_pair, positive

_WHERE = "quantization_config"
_SCALES = (".weight_scale", ".scale")
_SECOND = ".weight_scale_2"
_DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "U8")
_DECLARED = ("modelopt", "modelopt_fp4", "modelopt_mixed", "fbgemm_fp8")


def _tensors(contents: Contents) -> tuple[PackedTensor, ...]:
    settings = contents.config.get(_WHERE)
    settings = settings if isinstance(settings, Mapping) else {}
    if not _is_one(settings, contents.specs):
        return ()
    block = settings.get("weight_block_size") or [128, 128]
    if not is_pair(block):
        raise InputError(f"{_WHERE}: weight_block_size {block!r} is not a pair of numbers above 1")
    found = []
    for name, spec in contents.specs.items():
        module = name.removesuffix(".weight")
        scale = next((module + end for end in _SCALES if module + end in contents.specs), None)
        if module == name or spec.dtype not in ("F8_E4M3", "U8", "I8"):
            continue
        if scale is None:
            raise InputError(
                f"tensor {name!r} is {spec.dtype}, but there is no '{module}{_SCALES[0]}'"
            )
        found.append(_tensor(spec, contents.specs[scale], (block[0], block[1]), contents.specs))
    return tuple(found)


def _is_one(settings: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a checkpoint is in this layout: it says so, or only its tensors do."""
    if str(settings.get("quant_method")) in _DECLARED:
        return True
    exponents = (spec for spec in specs.values() if spec.dtype == "F8_E8M0")
    named = (name.removesuffix("scale") + "weight" for name in (s.name for s in exponents))
    return any(name in specs for name in named) or any(name.endswith(_SECOND) for name in specs)


def _tensor(
    weight: TensorSpec, scale: TensorSpec, block: tuple[int, int], specs: Mapping[str, TensorSpec]
) -> PackedTensor:
    common.tensor(specs, weight.name, 2)
    rows, stored = weight.shape
    if not rows * stored:
        raise InputError(f"tensor {weight.name!r} {list(weight.shape)} is empty")
    shape = (rows, stored if weight.dtype == "F8_E4M3" else 2 * stored)
    parts = {"weight": weight.name, "scale": scale.name}
    if scale.dtype not in _DTYPES:
        raise InputError(f"tensor {scale.name!r} is {scale.dtype}, not one of {', '.join(_DTYPES)}")
    name = f"{weight.name.removesuffix('.weight')}{_SECOND}"
    second = specs.get(name)
    if second is not None:
        parts["second"] = second.name
        if second.dtype != "F32" or prod(second.shape) != 1:
            stated = f"{second.dtype} {list(second.shape)}"
            raise InputError(f"tensor {second.name!r} is {stated}; one F32 was expected")
    elif weight.dtype != "F8_E4M3" and scale.dtype == "F8_E4M3":
        raise InputError(f"tensor {name!r} is missing")
    group = 32 if second is None else 16
    if group == 16 or weight.dtype != "F8_E4M3":
        if shape[1] % group:
            raise InputError(
                f"tensor {weight.name!r} has {shape[1]} columns, no multiple of {group}"
            )
        own = _block(scale, shape, [(1, group)])
    else:
        own = _block(scale, shape, [shape, (1, shape[1]), block, (1, group)])
    return PackedTensor(weight.name, shape, parts, own)


def _block(
    scale: TensorSpec, shape: tuple[int, int], blocks: list[tuple[int, int]]
) -> tuple[int, int]:
    """The first of these blocks whose scales have this shape. Raises InputError."""
    for rows, columns in blocks:
        grid = (ceil(shape[0] / rows), ceil(shape[1] / columns))
        alike: list[tuple[int, ...]] = [grid]
        alike += [grid[:1]] if grid[1] == 1 else []
        alike += [()] if grid == (1, 1) else []
        if scale.shape in alike:
            return rows, columns
    rows, columns = blocks[-1] if len(blocks) == 1 else blocks[2]
    wanted = [ceil(shape[0] / rows), ceil(shape[1] / columns)]
    raise InputError(
        f"tensor {scale.name!r} has shape {list(scale.shape)}; for a weight of {list(shape)} in"
        f" blocks of {rows} × {columns} it would be {wanted}"
    )


def _decode(packed: PackedTensor, parts: Mapping[str, Array]) -> NDArray[np.float32]:
    weight, (rows, columns) = parts["weight"], packed.shape
    if weight.dtype.itemsize == 1 and weight.shape == packed.shape:
        values = SMALL_FLOATS["e4m3"].values[fp8_codes(packed.parts["weight"], weight)]
    else:
        table, codes = SMALL_FLOATS["e2m1"].values, weight.view(np.uint8)
        values = np.stack((table[codes & 15], table[codes >> 4]), axis=-1).reshape(rows, columns)
    scales = _scales(packed.parts["scale"], parts["scale"])
    if "second" in parts:
        scales *= np.float32(positive(packed.parts["second"], parts["second"]))
    height, width = packed.block
    scales = scales.reshape(ceil(rows / height), ceil(columns / width))
    for top, own in zip(range(0, rows, height), scales, strict=True):
        values[top : top + height] *= np.repeat(own, width)[:columns]
    return values


def _scales(name: str, stored: Array) -> NDArray[np.float32]:
    """As float32. Raises InputError for NaN."""
    if stored.dtype.name in ("uint8", "float8_e8m0fnu"):
        stored = e8m0_scales(name, stored)
    elif stored.dtype.name == "float8_e4m3fn":
        stored = e4m3_scales(name, stored)
    scales = stored.astype(np.float32)
    if not np.isfinite(scales).all():
        raise InputError(f"tensor {name!r} holds a scale that is not finite")
    return scales


LAYOUT = ReadOnlyLayout("scaled-floats", _tensors, _decode)
