"""FP8, FP4 and MX in every layout: what is written is read back, and damage is named."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.errors import InputError
from ptq_cli.formats.compressed_tensors.layouts import layout
from ptq_cli.registry import FORMATS, format_named
from tests.formats.cases import layer as integer_layer
from tests.formats.cases import read_back, specs_of
from tests.formats.float_weights import GRIDS, any_codes, own_layer, rounded_float, written

CT, MLX, FP8 = "compressed-tensors", "mlx", "fp8"
SMALL = [name for name in GRIDS if name != "W4AFP8"]
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


@pytest.mark.parametrize(("fmt", "scheme"), HELD)
def test_each_knows_its_own(fmt: str, scheme: str) -> None:
    config, tensors = written(fmt, [own_layer(fmt, scheme)])
    for name in FORMATS:
        if name != "gguf":
            assert bool(read_back(format_named(name), config, tensors)) == (name == fmt)


@pytest.mark.parametrize(("fmt", "scheme"), HELD)
def test_row_by_row(fmt: str, scheme: str) -> None:
    """Where a format says so, rows packed alone are rows of what is packed whole."""
    record, own = format_named(fmt), own_layer(fmt, scheme)
    if not record.by_rows(own):
        return
    weight = any_codes(own)
    weight = weight if record.global_scale else replace(weight, grid=own.grid)
    whole, part = record.encode(own, weight), replace(own, shape=(8, 256), full_shape=(8, 256))
    for name, values in record.encode(part, weight.panel(slice(8, 16))).items():
        np.testing.assert_array_equal(values.view(np.uint8), whole[name][8:16].view(np.uint8))


def test_what_others_declare() -> None:
    """llm-compressor's words for FP8 and NVFP4, Qwen's and DeepSeek's for theirs."""
    plain = {"actorder": None, "block_structure": None, "observer_kwargs": {}, "symmetric": True}
    eight = {**plain, "num_bits": 8, "type": "float", "group_size": None}
    four = {
        **plain, "num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group",
        "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    groups = {
        "FP8_DYNAMIC": (
            "float-quantized",
            {**eight, "dynamic": False, "observer": "minmax", "strategy": "channel"},
            {**eight, "dynamic": True, "observer": None, "strategy": "token"},
        ),
        "NVFP4": (
            "nvfp4-pack-quantized",
            {**four, "dynamic": False, "observer": "static_minmax"},
            {**four, "dynamic": "local", "observer": "static_minmax"},
        ),
    }
    for scheme, (fmt, weights, inputs) in groups.items():
        own = own_layer(CT, scheme)
        config, tensors = written(CT, [own])
        group = {
            "input_activations": inputs, "output_activations": None, "targets": ["Linear"],
            "weights": weights,
        }  # fmt: skip
        config["quantization_config"] |= {
            "config_groups": {"group_0": group}, "format": fmt, "version": "0.12.2",
            "global_compression_ratio": 1.24,
        }  # fmt: skip
        (found,) = read_back(format_named(CT), config, tensors)
        assert (found.grid, found.activation) == (own.grid, own.activation)
    own = own_layer(FP8, "FP8_BLOCK", scale_dtype="float32")
    _, tensors = written(FP8, [own])
    for more in ({"scale_fmt": "ue8m0"}, {"modules_to_not_convert": ["model.layers.0.mlp.gate"]}):
        declared = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", **more}
        config = {"dtype": "bfloat16", "quantization_config": declared}
        (found,) = read_back(format_named(FP8), config, tensors)
        assert (found.grid, found.activation) == (own.grid, own.activation)


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
        if fmt not in ("ptq", CT, MLX, FP8, "gguf")
    ),
    *(
        (fmt, own_layer(CT, "FP8_DYNAMIC"), "integers.*, not FP8.*--format compressed-tensors")
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
    with pytest.raises(InputError, match="no global scale of NVFP4, and this weight has one"):
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
