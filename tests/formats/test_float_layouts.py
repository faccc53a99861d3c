"""FP8, FP4 and MX in every layout: what is written is read back, and damage is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import Array
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats.compressed_tensors.layouts import layout
from ptq_cli.registry import FORMATS, format_named
from tests.formats.cases import layer as integer_layer
from tests.formats.cases import read_back, specs_of
from tests.formats.float_weights import GRIDS, SCALES, float_layer, rounded_float

CT, MLX, FP8 = "compressed-tensors", "mlx", "fp8"
SMALL = [name for name in GRIDS if name != "W4AFP8"]
WIDE = {FP8: "float32"}
HELD = [
    *((CT, scheme) for scheme in SMALL),
    *((MLX, scheme) for scheme in ("NVFP4A16", "MXFP4A16", "MXFP8A16")),
    *((FP8, scheme) for scheme in ("FP8", "FP8_BLOCK")),
]
LAYOUTS = {
    "FP8_DYNAMIC": "float-quantized", "FP8": "float-quantized", "FP8_BLOCK": "float-quantized",
    "FP8A16": "naive-quantized", "NVFP4": "nvfp4-pack-quantized", "W4AFP8": "pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized", "MXFP8": "mxfp8-quantized", "MXFP8A16": "mxfp8-quantized",
}  # fmt: skip
MODULE = "model.layers.0.mlp.down_proj"


def own_layer(fmt: str, scheme: str, shape: tuple[int, int] = (24, 256), **more: Any) -> Layer:
    own = float_layer(scheme, shape, **more)
    if own.grid.scale_dtype == "bfloat16" and fmt in WIDE:
        own = replace(own, grid=replace(own.grid, scale_dtype=WIDE[fmt]))
    return own


def any_codes(own: Layer, seed: int = 0) -> QuantizedWeight:
    """Every code that means something, and any scales."""
    rng, grid = np.random.default_rng(seed), own.grid
    table = grid.small_float
    assert table is not None
    codes = np.flatnonzero(np.isfinite(table.values)).astype(np.uint8)
    shape = grid.scales_shape(own.shape)
    scales = np.exp2(rng.integers(-8, 8, shape)).astype(SCALES[grid.scale_dtype])
    if grid.scale_dtype == "e4m3":
        scales[0, 0] = 0
    calibrated = own.activation is not None and own.activation.calibrated
    return QuantizedWeight(
        codes=rng.permutation(np.resize(codes, own.size)).reshape(own.shape),
        scales=scales,
        zeros=np.zeros(shape, np.uint8),
        grid=replace(grid, global_scale=512.5) if grid.scale_dtype == "e4m3" else grid,
        input_scale=0.25 if calibrated else None,
    )


def written(fmt: str, layers: list[Layer]) -> tuple[dict[str, Any], dict[str, Array]]:
    record, tensors = format_named(fmt), {}
    for own in layers:
        weight = any_codes(own)
        if not record.global_scale:
            weight = replace(weight, grid=own.grid)
        tensors |= record.encode(own, weight)
    config: dict[str, Any] = {"dtype": "bfloat16"}
    config |= dict.fromkeys(record.config_keys, record.config(layers, ["lm_head"]))
    return config, tensors


@pytest.mark.parametrize(("fmt", "scheme"), HELD)
@pytest.mark.parametrize("shape", [(24, 256), (260, 128)])
def test_written_is_read(fmt: str, scheme: str, shape: tuple[int, int]) -> None:
    record, own = format_named(fmt), own_layer(fmt, scheme, shape)
    assert record.misfit(own) is None
    config, tensors = written(fmt, [own])
    assert specs_of(tensors) == {spec.name: spec for spec in record.specs(own)}
    (found,) = read_back(record, config, tensors)
    assert (found.shape, found.grid) == (own.shape, own.grid)
    assert found.activation == own.activation
    weight, back = any_codes(own), record.decode(found, tensors)
    assert back.codes.dtype == np.uint8
    np.testing.assert_array_equal(back.codes, weight.codes)
    assert back.scales.dtype == weight.scales.dtype
    np.testing.assert_array_equal(back.scales.view(np.uint8), weight.scales.view(np.uint8))
    assert not back.zeros.any()
    assert back.zeros.shape == weight.scales.shape
    assert back.input_scale == weight.input_scale
    whole = 512.5 if fmt == CT and own.grid.scale_dtype == "e4m3" else 1
    assert back.grid == replace(own.grid, global_scale=whole)


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_layouts_by_name(scheme: str) -> None:
    own = own_layer(CT, scheme)
    declared = format_named(CT).config([own], ["lm_head"])
    assert declared is not None
    assert declared["format"] == layout(own.grid, own.activation) == LAYOUTS[scheme]
    assert declared["config_groups"]["group_0"]["format"] == LAYOUTS[scheme]


def test_layers_that_differ_are_of_mixed_precision() -> None:
    layers = [
        own_layer(CT, scheme, module=f"model.layers.0.mlp.{name}_proj")
        for scheme, name in (("NVFP4A16", "gate"), ("NVFP4A16", "up"), ("FP8_DYNAMIC", "down"))
    ]
    config, tensors = written(CT, layers)
    declared = config["quantization_config"]
    assert declared["format"] == "mixed-precision"
    formats = [group["format"] for group in declared["config_groups"].values()]
    assert formats == ["nvfp4-pack-quantized", "float-quantized"]
    found = {own.module: own for own in read_back(format_named(CT), config, tensors)}
    assert {own.module: own.grid for own in layers} == {m: own.grid for m, own in found.items()}


def test_modes_of_mlx_side_by_side() -> None:
    layers = [
        own_layer(MLX, scheme, module=f"model.layers.{number}.mlp.down_proj")
        for number, scheme in enumerate(("MXFP4A16", "MXFP4A16", "MXFP8A16"))
    ]
    layers.append(replace(integer_layer(module="model.layers.3.mlp.down_proj"), dtype="BF16"))
    fmt = format_named(MLX)
    declared = fmt.config(layers, [])
    assert declared is not None
    assert declared["mode"] == "mxfp4"
    assert declared["model.layers.2.mlp.down_proj"]["mode"] == "mxfp8"
    assert "mode" not in declared["model.layers.3.mlp.down_proj"]  # which mlx-lm takes for affine


MISFITS = [
    *(
        (fmt, own_layer(CT, "NVFP4A16"), "holds integers, not FP4.*--format compressed-tensors")
        for fmt in FORMATS
        if fmt not in ("ptq", CT, MLX, FP8)
    ),
    *(
        (fmt, own_layer(CT, "FP8_DYNAMIC"), "holds integers, not FP8.*--format compressed-tensors")
        for fmt in FORMATS
        if fmt not in ("ptq", CT, MLX, FP8)
    ),
    (FP8, own_layer(CT, "FP8_DYNAMIC"), "no scales for rows; --scheme FP8_BLOCK"),
    (FP8, own_layer(CT, "NVFP4"), "holds FP8 .* not FP4"),
    (FP8, own_layer(CT, "MXFP8"), "128 rows × 128 columns of FP8, not for 1 × 32"),
    (FP8, integer_layer(), "holds FP8 .* not integers; --format compressed-tensors"),
    (FP8, own_layer(FP8, "FP8", module="lm_head"), "leave lm_head dense"),
    (FP8, replace(own_layer(FP8, "FP8_BLOCK"), activation=Activation()), "in groups of 128"),
    (FP8, own_layer(FP8, "FP8_BLOCK", (24, 96)), "of 128 .* in_features 96"),
    (MLX, own_layer(CT, "FP8_DYNAMIC"), "no FP8 with bfloat16 scales; --format compressed"),
    (MLX, own_layer(CT, "NVFP4"), "does not round inputs"),
    (CT, own_layer(CT, "NVFP4", (24, 40)), "16 columns do not divide in_features 40"),
    (CT, own_layer(CT, "MXFP4", (24, 48)), "32 columns do not divide in_features 48"),
    (CT, own_layer(CT, "FP8_BLOCK", (24, 96)), "128 columns .* 96.*--scheme FP8_DYNAMIC"),
    (CT, own_layer(CT, "FP8_DYNAMIC", dtype="F16"), "F16, which cannot hold bfloat16"),
    (CT, replace(own_layer(CT, "NVFP4"), activation=Activation()), "as the weights, or not"),
    (CT, replace(own_layer(CT, "W4AFP8"), grid=Grid(3)), "of 4 bits; --scheme W4AFP8"),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "own", "words"), MISFITS)
def test_misfits(fmt: str, own: Layer, words: str) -> None:
    misfit = format_named(fmt).misfit(own)
    assert misfit is not None
    assert re.search(words, f"{misfit.reason}; {misfit.hint}"), misfit


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


def test_siblings_with_other_numbers() -> None:
    layers = [
        own_layer(CT, scheme, module=f"model.layers.0.self_attn.{name}_proj")
        for scheme, name in (("NVFP4A16", "q"), ("MXFP4A16", "k"), ("NVFP4A16", "v"))
    ]
    words = "FP4 numbers .E2M1., group_size 16 .*FP4 numbers .E2M1., group_size 32, but runtimes"
    with pytest.raises(InputError, match=words):
        format_named(CT).config(layers, [])


def test_mlx_has_no_global_scale() -> None:
    own = own_layer(MLX, "NVFP4A16")
    assert not format_named(MLX).global_scale
    with pytest.raises(InputError, match=r"no global scale of NVFP4, which is 512\.5 here"):
        format_named(MLX).encode(own, any_codes(own))


@pytest.mark.parametrize(("dtype", "wanted"), [("BF16", None), ("F16", True), ("F32", True)])
def test_what_is_unpacked_to_bfloat16_asks_to_be_dequantized(
    dtype: str, wanted: bool | None
) -> None:
    declared = format_named(CT).config([own_layer(CT, "NVFP4A16", dtype=dtype)], ["lm_head"])
    assert declared is not None
    assert declared.get("dequantize") is wanted


@pytest.mark.parametrize(("fmt", "scheme"), HELD)
def test_rounded_by_the_definition(fmt: str, scheme: str) -> None:
    """A weight comes back within half a step of its greatest value's."""
    record, own = format_named(fmt), own_layer(fmt, scheme, (8, 256))
    weight = np.random.default_rng(3).normal(size=own.shape)
    rounded = rounded_float(own, weight, None if record.global_scale else 1.0)
    back = record.decode(own, record.encode(own, rounded))
    np.testing.assert_array_equal(back.dequantized(), rounded.dequantized())
    assert np.abs(back.dequantized() - weight).max() < 0.36 * np.abs(weight).max()
