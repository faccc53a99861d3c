"""Rounded weights of ggml's types with codes and scales at random."""

from __future__ import annotations

import numpy as np

from ptq_cli.core.grid import SUPER_BLOCK
from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import Array
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.numerics.scales import SCALE_DTYPES

DOWN = "model.layers.0.mlp.down_proj"


def ggml_layer(name: str, shape: tuple[int, int] = (6, 512), module: str = DOWN) -> Layer:
    return Layer(module, f"{module}.weight", shape, shape, "F16", TYPES[name].grid)


def ggml_weight(own: Layer, seed: int = 0, size: float = 0.02) -> QuantizedWeight:
    """Weights of about `size`, every number in the whole range of its bits."""
    rng, grid, (rows, columns) = np.random.default_rng(seed), own.grid, own.shape
    shape, blocks = grid.scales_shape(own.shape), (rows, columns // SUPER_BLOCK)
    codes = rng.integers(0, 2**grid.bits, own.shape).astype(np.uint8)
    largest = 2.0**grid.bits if grid.table is None else float(grid.table.max())
    step = size / largest
    zeros = np.full(shape, grid.mid_code if grid.integers and grid.sym else 0, np.uint8)

    def floats(top: float, of: tuple[int, int]) -> Array:
        return rng.uniform(0.1 * top, top, of)

    if grid.multiples is None:
        scales = floats(step, shape).astype(SCALE_DTYPES[grid.scale_dtype])
        offsets = -floats(size, shape).astype(np.float16) if grid.own_offsets else None
        return QuantizedWeight(codes, scales, zeros, grid, offsets=offsets)
    least, greatest = grid.multiples
    dtype = np.uint8 if least == 0 else np.int8
    scales, mins = rng.integers(least, greatest + 1, (2, *shape)).astype(dtype)
    d, dmin = floats(step / greatest, blocks), floats(size / greatest, blocks)
    affine = grid.own_offsets
    return QuantizedWeight(
        codes, scales, zeros, grid,
        offsets=mins if affine else None,
        super_scales=d.astype(np.float16),
        super_offsets=dmin.astype(np.float16) if affine else None,
    )  # fmt: skip


def same_numbers(one: QuantizedWeight, other: QuantizedWeight) -> None:
    """Every number that is stored, and its dtype."""
    for name in ("codes", "scales", "zeros", "offsets", "super_scales", "super_offsets"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            assert ours.dtype == theirs.dtype, name
    assert one.grid == other.grid
