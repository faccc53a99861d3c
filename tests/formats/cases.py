"""Golden vectors, random layers and random rounded weights for the tests of formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.formats import awq, compressed_tensors, gguf, gptq, mlx, onnx
from ptq_cli.numerics.scales import SCALE_DTYPES

GOLDEN = Path(__file__).parent.parent / "golden"
VECTORS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text())["vectors"]

FORMATS: dict[str, Format] = {
    record.name: record
    for record in (
        gptq.FORMAT,
        gptq.FORMAT_V2,
        awq.FORMAT,
        compressed_tensors.FORMAT,
        mlx.FORMAT,
        gguf.FORMAT,
        onnx.FORMAT,
    )
}

WORDS = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8", "uint8": "U8",
    "int32": "I32", "uint32": "U32", "int64": "I64",
    "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def vectors(prefix: str) -> list[str]:
    found = [name for name in VECTORS if name.startswith(prefix)]
    assert found
    return found


def golden(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    return VECTORS[name], load_file(GOLDEN / VECTORS[name]["file"])


def layer(
    shape: tuple[int, int] = (64, 128),
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    *,
    scale_dtype: str = "float16",
    dtype: str = "F16",
    module: str = "model.layers.0.mlp.down_proj",
    reordered: bool = False,
    activation: Activation | None = None,
    mirrored: bool = False,
) -> Layer:
    grid = Grid(bits, group_size, sym, scale_dtype=scale_dtype, mirrored=mirrored)
    tensor = f"{module}.weight"
    return Layer(module, tensor, shape, shape, dtype, grid, reordered, activation=activation)


def rounded(own: Layer, seed: int = 0, lowest_zero: int = 0) -> QuantizedWeight:
    rng = np.random.default_rng(seed)
    grid, (rows, columns) = own.grid, own.shape
    shape = grid.scales_shape(own.shape)
    zeros = np.full(shape, grid.mid_code, np.uint8)
    if grid.mirrored:
        zeros -= rng.integers(0, 2, shape).astype(np.uint8)
    if not grid.sym:
        zeros = rng.integers(lowest_zero, grid.max_code + 1, shape).astype(np.uint8)
    g_idx = rng.permutation(grid.g_idx(columns)).astype(np.int32) if own.reordered else None
    static = own.activation is not None and not own.activation.dynamic
    scales = rng.uniform(0.001, 0.1, shape).astype(SCALE_DTYPES[grid.scale_dtype])
    return QuantizedWeight(
        codes=rng.integers(0, grid.max_code + 1, (rows, columns)).astype(np.uint8),
        scales=scales,
        zeros=zeros,
        grid=grid,
        g_idx=g_idx,
        input_scale=0.25 if static else None,
        input_zero=None if not static or own.activation.sym else 3,
    )


def unmirrored(weight: QuantizedWeight) -> QuantizedWeight:
    """A peer's weight as this tool has it: group by group, `−s · (code − mid)` in other words."""
    codes, scales, zeros = weight.codes.copy(), weight.scales.copy(), weight.zeros.copy()
    grid, groups = weight.grid, weight.column_groups().tolist()
    for row, group in np.argwhere(np.signbit(scales)):
        scales[row, group] *= -1
        zeros[row, group] = grid.max_code - zeros[row, group]
        for column in [place for place, own in enumerate(groups) if own == group]:
            codes[row, column] = grid.max_code - codes[row, column]
    return replace(weight, codes=codes, scales=scales, zeros=zeros)


def specs_of(tensors: dict[str, Array]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(name, WORDS[values.dtype.name], values.shape)
        for name, values in tensors.items()
    }


def folder(
    record: Format, layers: list[Layer], dense: tuple[str, ...] = ("lm_head",)
) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a model folder in this format has: config.json and tensors."""
    tensors: dict[str, Array] = {}
    for own in layers:
        tensors |= record.encode(own, rounded(own, lowest_zero=1))
    declared = record.config(layers, dense)
    config: dict[str, Any] = {
        "dtype": {"BF16": "bfloat16", "F32": "float32"}.get(layers[0].dtype, "float16")
    }
    for key in record.config_keys if declared is not None else ():
        config[key] = json.loads(json.dumps(declared))
    return config, tensors


def read_back(
    record: Format, config: dict[str, Any], tensors: dict[str, Array], metadata: Any = None
) -> tuple[Layer, ...]:
    specs = specs_of(tensors)
    return record.layers(Contents(metadata or {}, config, specs, tensors.__getitem__))
