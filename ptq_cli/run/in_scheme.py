"""Codes of small floats in another scheme that has the same levels, without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import floor, log2

from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.errors import InputError
from ptq_cli.formats.common import NUMBERS
from ptq_cli.formats.fused import fused_groups
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.storage.quantized import QuantizedFolder

_GREATEST_POWER = 8  # 2^8 is the greatest power of two among E4M3 numbers


def in_scheme(
    layers: Sequence[Layer], name: str, folder: QuantizedFolder, fmt: Format
) -> list[Layer]:
    """The layers in another scheme of the same levels: MXFP4's groups of 32 are two of NVFP4's, and
    its powers of two are E4M3 scales under a global one that is a power of two, too."""
    scheme, changed = SCHEMES[name], []
    for layer in layers:
        levels = layer.grid.levels
        if not scheme.fixed or levels != scheme.grid["levels"]:
            raise InputError(
                f"{layer.module}: its codes are {NUMBERS[levels]}, which {name} does not have",
                hint=f"round it anew: ptq rtn --scheme {name}",
            )
        group_size = scheme.settings["group_size"]
        grid = replace(layer.grid, group_size=group_size, **scheme.grid)
        changed.append(replace(layer, grid=grid, activation=scheme.inputs))
    known = {
        layer.module: layer
        for layer, before in zip(changed, layers, strict=True)
        if layer.grid.scale_dtype == "e4m3" != before.grid.scale_dtype
    }
    for modules in fused_groups(known) if fmt.global_scale else ():
        largest = max(folder.load(module).float_scales().max(initial=0) for module in modules)
        exponent = _GREATEST_POWER - floor(log2(largest)) if largest > 0 else 0
        for module in modules:
            grid = replace(known[module].grid, global_scale=2.0**exponent)
            known[module] = replace(known[module], grid=grid)
    return [known.get(layer.module, layer) for layer in changed]
