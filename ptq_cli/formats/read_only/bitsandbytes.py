"""bitsandbytes, 4 bits (NF4, FP4) and 8 bits (LLM.int8).

Per linear `<module>` of 4 bits, with n weights:

    <module>.weight                        U8 [n / 2, 1]   two codes to a byte, the higher first
    <module>.weight.quant_map              F32 [16]        what each code means
    <module>.weight.absmax                 F32 [n / 64]    of each block; with nested_absmax U8
    <module>.weight.nested_absmax          F32 [n / 64 / 256], and nested_quant_map F32 [256]
    <module>.weight.quant_state.bitsandbytes__nf4  U8      JSON: shape, blocksize, nested_blocksize,
                                                           nested_offset

`weight = quant_map[code] · absmax`, `absmax = nested_quant_map[code] · nested_absmax +
nested_offset`. Of 8 bits: `weight` I8 [N, K] and `SCB` F32 [N], `weight · SCB / 127`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.plugins import Contents, PackedTensor, ReadOnlyLayout
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats import common

_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")
_NESTED = ("nested_absmax", "nested_quant_map")
_PER_127 = np.float32(7.874015718698502e-3)  # as the library has it


def _tensors(contents: Contents) -> tuple[PackedTensor, ...]:
    four = [_four_bits(name, contents) for name in contents.specs if _STATE.search(name)]
    modules = common.modules_with(contents.specs, ".SCB")
    return (*four, *(_eight_bits(module, contents.specs) for module in modules))


def _four_bits(state: str, contents: Contents) -> PackedTensor:
    name, specs = _STATE.sub("", state), contents.specs
    settings = _settings(state, contents.read(state))
    shape, block = tuple(settings["shape"]), settings["blocksize"]
    blocks = ceil(prod(shape) / block)
    parts = {"weight": name, "absmax": f"{name}.absmax", "map": f"{name}.quant_map", "state": state}
    nested = "nested_blocksize" in settings
    expected = [
        TensorSpec(parts["absmax"], "U8" if nested else "F32", (blocks,)),
        TensorSpec(parts["map"], "F32", (16,)),
    ]
    if nested:
        parts |= {word: f"{name}.{word}" for word in _NESTED}
        outer = ceil(blocks / settings["nested_blocksize"])
        expected.append(TensorSpec(parts["nested_absmax"], "F32", (outer,)))
        expected.append(TensorSpec(parts["nested_quant_map"], "F32", (256,)))
    common.check_specs(specs, expected, f"{state} ({list(shape)} in blocks of {block})")
    weight = specs.get(name)
    if weight is None or weight.dtype != "U8" or prod(weight.shape) != ceil(prod(shape) / 2):
        raise InputError(f"tensor {name!r} does not hold the {list(shape)} that {state} states")
    return PackedTensor(name, shape, parts)


def _settings(name: str, stored: Array) -> dict[str, Any]:
    """The JSON that a `quant_state` holds. Raises InputError where it is damaged."""
    try:
        settings = json.loads(bytes(stored))
        sizes = [settings["blocksize"], *settings["shape"]]
        sizes.append(settings.get("nested_blocksize", 1))
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError
        float(settings.get("nested_offset", 0.0))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"tensor {name!r} is no quantization state of bitsandbytes") from None
    return dict(settings)


def _eight_bits(module: str, specs: Mapping[str, TensorSpec]) -> PackedTensor:
    name, scale = f"{module}.weight", f"{module}.SCB"
    shape = common.tensor(specs, name, 2).shape
    expected = [TensorSpec(name, "I8", shape), TensorSpec(scale, "F32", shape[:1])]
    common.check_specs(specs, expected, "bitsandbytes (8 bits)")
    return PackedTensor(name, shape, {"weight": name, "scale": scale})


def _decode(packed: PackedTensor, parts: Mapping[str, Array]) -> NDArray[np.float32]:
    if "scale" in parts:
        values = parts["weight"].astype(np.float32) * parts["scale"][:, None] * _PER_127
        return values.astype(np.float32, copy=False)
    settings = _settings(packed.parts["state"], parts["state"])
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        outer = np.repeat(parts["nested_absmax"], settings["nested_blocksize"])[: len(absmax)]
        absmax = parts["nested_quant_map"][absmax] * outer
        absmax = absmax + np.float32(settings.get("nested_offset", 0.0))
    codes, size = parts["weight"].reshape(-1), prod(packed.shape)
    values = parts["map"][np.stack((codes >> 4, codes & 15), axis=-1).reshape(-1)[:size]]
    values *= np.repeat(absmax, settings["blocksize"])[:size]
    return values.reshape(packed.shape)


LAYOUT = ReadOnlyLayout("bitsandbytes", _tensors, _decode)
