"""Folders of small floats that somebody damaged: each error names the tensor or the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.core.tensors import Array
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.registry import format_named
from tests.formats.cases import read_back
from tests.formats.float_weights import own_layer, written

CT, MLX, FP8 = "compressed-tensors", "mlx", "fp8"
MODULE = "model.layers.0.mlp.down_proj"
Damage = Callable[[dict[str, Any], dict[str, Array]], None]


def put(name: str, change: Callable[[Array], Array]) -> Damage:
    def apply(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        tensors[f"{MODULE}.{name}"] = change(tensors[f"{MODULE}.{name}"].copy())

    return apply


def drop(name: str) -> Damage:
    return lambda config, tensors: tensors.__delitem__(f"{MODULE}.{name}")


def byte(name: str, value: int) -> Damage:
    """One byte of a tensor, at its second row, third column."""

    def change(values: Array) -> Array:
        values.view(np.uint8)[1, 2] = value
        return values

    return put(name, change)


def weights(**settings: Any) -> Damage:
    def apply(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(settings)

    return apply


def inputs(**settings: Any) -> Damage:
    def apply(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"].update(settings)

    return apply


def settings(**changes: Any) -> Damage:
    return lambda config, tensors: config["quantization_config"].update(changes)


def to(dtype: Any) -> Callable[[Array], Array]:
    return lambda values: values.astype(np.float32).astype(dtype)


E4M3 = ml_dtypes.float8_e4m3fn
DAMAGED = [
    (CT, "FP8_DYNAMIC", byte("weight", 0x7F), r"weight' holds NaN .* at index \[1, 2\], 1 in all"),
    (CT, "FP8_DYNAMIC", byte("weight", 0xFF), "holds NaN .byte 0x7F or 0xFF."),
    (CT, "FP8_DYNAMIC", drop("weight_scale"), "no tensor is named"),
    (CT, "FP8_DYNAMIC", put("weight_scale", lambda x: x[:, 0]), "has shape .260., 2 axes"),
    (CT, "FP8_DYNAMIC", put("weight_scale", lambda x: x.T), r"BF16 \[1, 260\]; .* BF16 \[260, 1\]"),
    (CT, "FP8_DYNAMIC", put("weight_scale", to(E4M3)), "is F8_E4M3; scales are F16, BF16 or F32"),
    (CT, "FP8_DYNAMIC", put("weight", lambda x: x.view(np.int8)), "is I8 .* asks for F8_E4M3"),
    (CT, "FP8_DYNAMIC", weights(strategy="tensor"), "has shape .260, 1., 1 axes were expected"),
    (CT, "FP8_DYNAMIC", weights(symmetric=False), "not symmetric"),
    (CT, "FP8_DYNAMIC", weights(strategy="group", group_size=64), "strategy 'group'.* 64"),
    (CT, "FP8_DYNAMIC", inputs(num_bits=4), "type 'float', 4 bits, strategy 'token'"),
    (CT, "FP8_DYNAMIC", inputs(dynamic="now"), "dynamic is 'now'"),
    (CT, "FP8", put("input_scale", lambda x: -x), r"input_scale' is -0.25; a finite number above"),
    (CT, "FP8", drop("input_scale"), "input_scale' is missing"),
    (CT, "FP8_BLOCK", weights(block_structure=[64, 128]), r"is BF16 \[3, 2\]; .* \[5, 2\]"),
    (CT, "FP8_BLOCK", weights(block_structure=[128, 96]), "96 does not divide in_features 256"),
    (CT, "FP8_BLOCK", weights(block_structure=128), "block_structure 128 .* not understood"),
    (CT, "NVFP4", put("weight_global_scale", lambda x: x * 0), "is 0; a finite number above 0"),
    (CT, "NVFP4", put("weight_global_scale", lambda x: x * np.nan), "is nan; a finite number"),
    (CT, "NVFP4", put("weight_global_scale", lambda x: x.astype(np.float16)), "is F16 .1.; .* F32"),
    (CT, "NVFP4", drop("weight_global_scale"), "weight_global_scale' is missing"),
    (CT, "NVFP4", put("input_global_scale", lambda x: x * np.inf), "is inf; a finite number"),
    (CT, "NVFP4", byte("weight_scale", 0x7F), "weight_scale' holds NaN"),
    (CT, "NVFP4", byte("weight_scale", 0x85), r"holds a scale below zero at index \[1, 2\]"),
    (CT, "NVFP4", put("weight_packed", lambda x: x[:, :-2]), "16 does not divide in_features 252"),
    (CT, "NVFP4", put("weight_scale", lambda x: x[:, :-1]), r"\[260, 15\]; .*\[260, 16\]"),
    (CT, "NVFP4", weights(group_size=32), "strategy 'tensor_group', group_size 32"),
    (CT, "MXFP4", byte("weight_scale", 0xFF), r"the exponent 255, NaN, at index \[1, 2\]"),
    (CT, "MXFP4", put("weight_packed", lambda x: x[:, :-4]), "32 does not divide in_features 248"),
    (CT, "MXFP8", put("weight_scale", lambda x: x.view(np.int8)), "is I8 .* asks for U8"),
    (CT, "MXFP8", settings(format="naive-quantized"), None),  # the group's own format counts
    (MLX, "MXFP8A16", byte("weight", 0x7F), "weight' holds NaN"),
    (MLX, "NVFP4A16", byte("scales", 0x90), "a scale below zero"),
    (MLX, "MXFP4A16", byte("scales", 0xFF), "exponent 255"),
    (MLX, "MXFP4A16", put("weight", lambda x: x[:, :-1]), r"U32 \[260, 31\]; .* \[260, 32\]"),
    (FP8, "FP8", put("weight_scale_inv", lambda x: x.reshape(1, 1)), None),
    (FP8, "FP8", put("activation_scale", lambda x: x * 0), "activation_scale' is 0; a finite"),
    (FP8, "FP8", settings(weight_block_size=[128, 128]), r"is F32 \[\]|has shape \[\]"),
    (FP8, "FP8_BLOCK", byte("weight", 0xFF), "holds NaN"),
    (FP8, "FP8_BLOCK", drop("weight_scale_inv"), "no tensor is named .*weight_scale_inv"),
    (FP8, "FP8_BLOCK", put("weight_scale_inv", to(np.float16)), "is F16; scales are F32, BF16 or"),
    (FP8, "FP8_BLOCK", put("weight_scale_inv", lambda x: x[:2]), r"F32 \[2, 2\]; .* \[3, 2\]"),
    (FP8, "FP8_BLOCK", settings(weight_block_size=[64, 64]), r"F32 \[3, 2\]; .* \[5, 4\]"),
    (FP8, "FP8_BLOCK", settings(weight_block_size=128), "128 is not a pair"),
    (FP8, "FP8_BLOCK", settings(fmt="e5m2"), "fmt 'e5m2' is not understood"),
    (FP8, "FP8_BLOCK", settings(activation_scheme="none"), "activation_scheme 'none'"),
    (FP8, "FP8_BLOCK", settings(expert_dtype="fp4"), "expert_dtype is not a setting"),
    (FP8, "FP8_BLOCK", settings(modules_to_not_convert=["mlp"]), None),
    (FP8, "FP8_BLOCK", settings(modules_to_not_convert=["down_proj"]), "says it is left dense"),
]


@pytest.mark.parametrize(("fmt", "scheme", "damage", "message"), DAMAGED)
def test_damage(fmt: str, scheme: str, damage: Damage, message: str | None) -> None:
    record = format_named(fmt)
    config, tensors = written(fmt, [own_layer(fmt, scheme, (260, 256))])

    def read() -> list[QuantizedWeight]:
        return [record.decode(own, tensors) for own in read_back(record, config, tensors)]

    assert len(read()) == 1
    damage(config, tensors)
    if message is None:
        assert len(read()) == 1
        return
    with pytest.raises(InputError, match=message):
        read()


@pytest.mark.parametrize(("fmt", "ending"), [(CT, "weight_scale"), (FP8, "weight_scale_inv")])
def test_one_weight_without_its_scale(fmt: str, ending: str) -> None:
    names = [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    scheme = "FP8_BLOCK"
    config, tensors = written(fmt, [own_layer(fmt, scheme, module=name) for name in names])
    del tensors[f"{names[1]}.{ending}"]
    with pytest.raises(InputError, match=f"is F8_E4M3, but there is no '{names[1]}.{ending}'"):
        read_back(format_named(fmt), config, tensors)


def test_siblings_with_other_global_scales() -> None:
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    layers = [own_layer(CT, "NVFP4A16", module=name) for name in names]
    config, tensors = written(CT, layers)
    assert len(read_back(format_named(CT), config, tensors)) == 3
    tensors[f"{names[2]}.weight_global_scale"] *= 2
    with pytest.raises(InputError, match=r"k_proj.* is 512.5 and .*v_proj.* 1025, but runtimes"):
        read_back(format_named(CT), config, tensors)
