"""The layouts of compressed-tensors, by the names that it gives them."""

from __future__ import annotations

from ptq_cli.core.grid import Activation, Grid

PACKED, PLAIN = "pack-quantized", "int-quantized"
FLOAT, NAIVE = "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"


def layout(grid: Grid, activation: Activation | None) -> str:
    """The layout for weights on this grid, with inputs that are rounded so."""
    if grid.levels == "e2m1":
        return NVFP4 if grid.scale_dtype == "e4m3" else MXFP4
    if grid.levels == "e4m3":
        return MXFP8 if grid.scale_dtype == "e8m0" else NAIVE if activation is None else FLOAT
    plain = grid.bits == 8 and activation is not None and activation.levels == "integer"
    return PLAIN if plain else PACKED


def read_as(grid: Grid, activation: Activation | None) -> tuple[str, ...]:
    """Names under which others store what `layout` names: FP8 has the same tensors in two."""
    own = layout(grid, activation)
    return (FLOAT, NAIVE) if own in (FLOAT, NAIVE) else (own,)
