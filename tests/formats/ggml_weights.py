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


def ggml_weight(own: Layer, seed: int = 0, spread: float = 0.02) -> QuantizedWeight:
    """Weights around zero with about that standard deviation; codes and multiples take all values
    that their bits have."""
    rng, grid, (rows, columns) = np.random.default_rng(seed), own.grid, own.shape
    shape, blocks = grid.scales_shape(own.shape), (rows, columns // SUPER_BLOCK)
    codes = rng.integers(0, 2**grid.bits, own.shape).astype(np.uint8)
    symmetric = grid.integers and grid.sym
    zeros = np.full(shape, grid.mid_code if symmetric else 0, np.uint8)
    levels = np.arange(2.0**grid.bits) if grid.table is None else grid.table
    step, middle = spread / levels.std(), grid.mid_code

    def about(value: float, of: tuple[int, int]) -> Array:
        return rng.uniform(0.7 * value, 1.3 * value, of)

    if grid.multiples is None:
        scales = about(step, shape).astype(SCALE_DTYPES[grid.scale_dtype])
        offsets = (-middle * about(step, shape)).astype(np.float16) if grid.own_offsets else None
        return QuantizedWeight(codes, scales, zeros, grid, offsets=offsets)
    least, greatest = grid.multiples
    multiples = rng.integers(least, greatest + 1, shape)
    mins = np.clip(multiples + rng.integers(-1, 2, shape), 0, greatest).astype(np.uint8)
    d = about(step / np.sqrt(np.square(multiples).mean()), blocks).astype(np.float16)
    affine = grid.own_offsets
    return QuantizedWeight(
        codes, multiples.astype(np.int8 if least < 0 else np.uint8), zeros, grid,
        offsets=mins if affine else None,
        super_scales=d,
        super_offsets=(d * np.float16(middle)) if affine else None,
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
