"""Golden vectors of small floats: their clients' bytes are ours, and decode to the same values."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import Array
from ptq_cli.registry import format_named
from ptq_cli.storage.checkpoint import open_checkpoint
from tests.formats.cases import GOLDEN, VECTORS, specs_of, vectors
from tests.formats.float_weights import GRIDS, nearest_codes

MODULE = "model.layers.0.self_attn.q_proj"
BLOCK = {"block_rows": 8, "group_size": 32, "scale_dtype": "float32"}
SCHEMES = {
    "ct_float_rows": ("FP8_DYNAMIC", {"scale_dtype": "float32"}),
    "ct_float_tensor": ("FP8A16", {"group_size": 0, "scale_dtype": "float32"}),
    "ct_float_block": ("FP8_BLOCK", BLOCK),
    "ct_nvfp4": ("NVFP4A16", {}),
    "ct_mxfp4": ("MXFP4A16", {}),
    "ct_mxfp8": ("MXFP8A16", {}),
    "mlx_mxfp4": ("MXFP4A16", {}),
    "mlx_mxfp8": ("MXFP8A16", {}),
    "mlx_nvfp4": ("NVFP4A16", {}),
    "fp8_block": ("FP8_BLOCK", BLOCK),
    "fp8_block_ue8m0": ("FP8_BLOCK", BLOCK | {"scale_dtype": "e8m0"}),
    "fp8_tensor": ("FP8A16", {"group_size": 0, "scale_dtype": "float32"}),
}


def peer(name: str) -> tuple[str, Layer, dict[str, Array], dict[str, Array]]:
    """Format, layer, the client's tensors, and what else the file has."""
    opened = open_checkpoint(GOLDEN / VECTORS[name]["file"])
    arrays = {own: opened.read(own) for own in opened.tensors}
    scheme, changes = SCHEMES[name.removeprefix("floats_")]
    grid, activation = GRIDS[scheme]
    shape = arrays["weight"].shape
    layer = Layer(
        MODULE, f"{MODULE}.weight", shape, shape, "F32", replace(grid, **changes),
        activation=activation,
    )  # fmt: skip
    stored = {
        key.replace("stored", MODULE): value
        for key, value in arrays.items()
        if key.startswith("stored.")
    }
    return VECTORS[name]["format"].split("/")[0], layer, stored, arrays


@pytest.mark.parametrize("name", vectors("floats_"))
def test_the_clients_bytes(name: str) -> None:
    fmt, layer, stored, arrays = peer(name)
    record = format_named(fmt)
    specs = {spec.name: spec for spec in record.specs(layer)}
    scalar = f"{MODULE}.weight_scale_inv"
    if name == "floats_fp8_tensor":  # transformers writes [1, 1], and its module has a scalar
        assert stored[scalar].shape == (1, 1)
        stored[scalar] = stored[scalar].reshape(())
    assert specs_of(stored) == specs
    back = record.decode(layer, stored)
    again = record.encode(layer, back)
    assert again.keys() == stored.keys()
    for key, values in stored.items():
        assert again[key].dtype == values.dtype
        assert again[key].tobytes() == values.tobytes(), key
    ours = back.dequantized()
    if name == "floats_ct_nvfp4":  # the client computes it in bfloat16
        ours = ours.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(ours, arrays["dequant"])


@pytest.mark.parametrize("name", vectors("floats_ct"))
def test_the_clients_codes_are_the_nearest(name: str) -> None:
    """Ties go to the even code, by compressed-tensors too."""
    fmt, layer, stored, arrays = peer(name)
    back = format_named(fmt).decode(layer, stored)
    grid: Grid = back.grid
    width = grid.width(layer.shape[1])
    down = layer.shape[0] if grid.group_size == 0 else grid.block_rows
    scales = np.repeat(np.repeat(back.float_scales().astype(np.float32), down, 0), width, 1)
    nearest = nearest_codes(arrays["weight"] / scales, grid)
    assert grid.small_float is not None
    values = grid.small_float.values  # of zeros, the sign may differ
    np.testing.assert_array_equal(values[back.codes], values[nearest])
