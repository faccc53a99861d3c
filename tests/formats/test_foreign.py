"""Folders someone else may have written: recognised, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptq_cli.core.grid import Activation
from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError
from tests.formats.cases import FORMATS, folder, layer, read_back

DOWN = "model.layers.0.mlp.down_proj"


def change(**settings: Any) -> Callable[[dict[str, Any], dict[str, Array]], None]:
    """Change keys of the declaration; None takes one away."""

    def apply(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        for own in config.values():
            if isinstance(own, dict):
                for key, value in settings.items():
                    own[key] = value
                    if value is None:
                        del own[key]

    return apply


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Array]], None]:
    return lambda config, tensors: tensors.__delitem__(f"{DOWN}.{name}")


def put(name: str, values: Array) -> Callable[[dict[str, Any], dict[str, Array]], None]:
    return lambda config, tensors: tensors.__setitem__(f"{DOWN}.{name}", values)


def weights(**settings: Any) -> Callable[[dict[str, Any], dict[str, Array]], None]:
    """Change keys of the weights' scheme in compressed-tensors' first group."""

    def apply(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(settings)

    return apply


def group(**settings: Any) -> Callable[[dict[str, Any], dict[str, Array]], None]:
    def apply(config: dict[str, Any], tensors: dict[str, Array]) -> None:
        config["quantization_config"]["config_groups"]["group_0"].update(settings)

    return apply


def words(*shape: int) -> Array:
    return np.zeros(shape, np.int32)


REORDERED = np.repeat(np.array([1, 0, 2, 3], np.int32), 32)
CT = "compressed-tensors"

REFUSED: list[tuple[str, Any, str]] = [
    ("gptq", drop("scales"), f"'{DOWN}.scales' is missing"),
    ("gptq", drop("g_idx"), f"'{DOWN}.g_idx' is missing"),
    ("gptq", drop("qzeros"), f"'{DOWN}.qzeros' is missing"),
    ("gptq", drop("qweight"), f"'{DOWN}.qweight' is missing"),
    ("gptq", change(bits=8), r"is I32 \[16, 64\]; .*8 bits.* asks for I32 \[32, 64\]"),
    ("gptq", change(group_size=64), r"is I32 \[4, 8\].* asks for I32 \[2, 8\]"),
    ("gptq", change(group_size=0), "group_size 0 is not GPTQ"),
    ("gptq", change(bits=None), "bits is None, a whole number"),
    ("gptq", change(bits="4"), "bits is '4', a whole number"),
    ("gptq", change(sym="yes"), "sym is 'yes', true or false"),
    ("gptq", change(checkpoint_format="gptq_p"), "layout 'gptq_p' is not understood"),
    ("gptq", change(checkpoint_format="marlin"), "layout 'marlin' is not understood"),
    ("gptq", change(pack_dtype="int64"), "pack_dtype 'int64', not int32"),
    ("gptq", change(rotation="hadamard"), "rotation is not a setting"),
    ("gptq", change(dynamic={"-:.*down.*": {}}), "packed, but '-:.*down.*' leaves it dense"),
    ("gptq", change(dynamic={"+:(": {}}), "is no regular expression"),
    ("gptq", change(dynamic=["x"]), "an object was expected"),
    ("gptq", put("g_idx", REORDERED), "reorders groups, but desc_act is false"),
    ("gptq", put("g_idx", REORDERED + 1), "outside 0 … 3"),
    ("gptq", put("g_idx", words(128)), "more than 32 columns"),
    ("gptq", put("weight", np.zeros((64, 128), np.float16)), "both 'weight' and 'qweight'"),
    ("gptq", put("scales", np.zeros((4, 64), np.int32)), "scales are F16, BF16 or F32"),
    (
        "gptq_v2",
        lambda config, tensors: config.update(quantization_config="no"),
        "quantization_config is 'no', an object was expected",
    ),
    ("awq", drop("scales"), f"'{DOWN}.scales' is missing"),
    ("awq", drop("qzeros"), f"'{DOWN}.qzeros' is missing"),
    ("awq", change(version="gemv"), "version 'gemv' is not understood"),
    ("awq", change(bits=8), "8 bits is not understood"),
    ("awq", change(group_size=48), "48 does not divide"),
    ("awq", change(group_size=64), r"is I32 \[4, 8\].* asks for I32 \[2, 8\]"),
    ("awq", change(desc_act=True), "desc_act is true"),
    ("awq", change(modules_to_not_convert=["down_proj"]), "'down_proj' says it is left dense"),
    ("awq", change(modules_to_not_convert="x"), "a list of names"),
    ("awq", put("g_idx", words(128)), "both 'qweight' and 'g_idx'"),
    (CT, drop("weight_shape"), f"'{DOWN}.weight_shape' is missing"),
    (CT, drop("weight_scale"), f"'{DOWN}.weight_scale' is missing"),
    (CT, drop("weight_packed"), f"'{DOWN}.weight_packed' is missing"),
    (CT, change(quantization_status="frozen"), "is 'frozen', not 'compressed'"),
    (CT, change(config_groups={}), "config_groups is missing"),
    (CT, change(ignore=["re:.*down_proj"]), "'re:.*down_proj' in ignore leaves it dense"),
    (CT, change(ignore=["Linear"]), "'Linear' in ignore"),
    (CT, change(sparsity_config={"format": "sparse-24"}), "'sparse-24' is not understood"),
    (CT, change(transform_config={"u": 1}), "transform_config is not a setting"),
    (CT, weights(num_bits=8), r"is \[64, 16\]; 64 × 128 codes of 8 bits ask for \[64, 32\]"),
    (CT, weights(group_size=64), r"is F16 \[64, 4\]; .* asks for F16 \[64, 2\]"),
    (CT, weights(actorder="group"), "actorder 'group' is not understood"),
    (CT, weights(type="float"), "format 'pack-quantized' .* only 'mxfp4-pack-quantized'"),
    (CT, weights(type="float", num_bits=6), "type 'float' with 6 bits are not understood"),
    (CT, weights(strategy="block"), "strategy 'block'"),
    (CT, weights(block_structure=[1, 2]), "block_structure .* not understood"),
    (CT, weights(symmetric=False), f"'{DOWN}.weight_zero_point' is missing"),
    (CT, put("weight_zero_point", words(8, 4)), "has zero points, but .* symmetric"),
    (CT, put("weight_shape", np.array([64, 120])), r"32 does not divide|asks? for"),
    (CT, put("weight_shape", np.array([32, 128])), r"\[64, 16\]; 32 × 128 codes"),
    (CT, group(targets=["re:.*up_proj"]), "no group of .* names it"),
    (CT, group(format="naive-quantized"), "format 'naive-quantized' is not understood"),
    (CT, group(input_activations={"num_bits": 4, "dynamic": True}), "4 bits, strategy 'token'"),
    (CT, group(output_activations={"num_bits": 8}), "output_activations is not a setting"),
    ("mlx", drop("scales"), f"'{DOWN}.scales' is missing"),
    ("mlx", drop("biases"), f"'{DOWN}.biases' is missing"),
    ("mlx", change(bits=8), r"is U32 \[64, 16\]; 8 bits"),
    ("mlx", change(group_size=64), r"is U32 \[64, 16\]; 4 bits, group_size 64"),
    ("mlx", change(mode="mxfp6"), "mode 'mxfp6' is not understood"),
    ("mlx", change(mode="mxfp4"), r"is F16 .* asks for U8"),
    ("mlx", change(mode="nvfp4"), r"4 bits in groups of 32 is not MLX .nvfp4."),
    ("mlx", change(extra=1), "extra is not a setting"),
    ("mlx", change(**{DOWN: False}), "says it is not"),
    ("mlx", change(**{DOWN: {"bits": 7}}), "7 bits in groups of 32 is not MLX"),
    ("mlx", lambda config, tensors: config["quantization"].update(bits=3), "differ"),
]


@pytest.mark.parametrize(("name", "damage", "message"), REFUSED)
def test_refused(name: str, damage: Any, message: str) -> None:
    config, tensors = folder(FORMATS[name], [layer()])
    assert len(read_back(FORMATS[name], config, tensors)) == 1
    damage(config, tensors)
    with pytest.raises(InputError, match=message):
        read_back(FORMATS[name], config, tensors)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", CT, "mlx"])
def test_no_packed_tensors(name: str) -> None:
    config, _ = folder(FORMATS[name], [layer()])
    with pytest.raises(InputError, match="no tensor is named"):
        read_back(FORMATS[name], config, {"model.norm.weight": np.zeros(3, np.float32)})


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_knows_its_own(name: str) -> None:
    """A folder of one format is nobody else's."""
    config, tensors = folder(FORMATS[name], [layer()])
    metadata = FORMATS[name].metadata([layer()])
    for other in FORMATS.values():
        if {name, other.name} & {"gguf"}:
            continue
        assert bool(read_back(other, config, tensors, metadata)) == (other.name == name)


def test_gptq_desc_act_with_trivial_order_is_not_reordered() -> None:
    config, tensors = folder(FORMATS["gptq"], [layer(reordered=True)])
    assert config["quantization_config"]["desc_act"] is True
    assert read_back(FORMATS["gptq"], config, tensors)[0].reordered
    tensors[f"{DOWN}.g_idx"] = np.repeat(np.arange(4, dtype=np.int32), 32)
    assert not read_back(FORMATS["gptq"], config, tensors)[0].reordered


def test_gptq_v1_asymmetric_is_read_unless_a_zero_is_ambiguous() -> None:
    own = layer(sym=False)
    _, tensors = folder(FORMATS["gptq_v2"], [own])
    config = {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    }
    (found,) = read_back(FORMATS["gptq"], config, tensors)
    tensors[f"{DOWN}.qzeros"] &= 0x77777777
    assert FORMATS["gptq"].decode(found, tensors).zeros.max() <= 8
    tensors[f"{DOWN}.qzeros"] |= 0x0000000F
    with pytest.raises(InputError, match=r"does not fit gptq .v1."):
        FORMATS["gptq"].decode(found, tensors)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_declared_symmetric_but_not(name: str) -> None:
    config, tensors = folder(FORMATS[name], [layer()])
    (found,) = read_back(FORMATS[name], config, tensors)
    tensors[f"{DOWN}.qzeros"][0, 0] ^= 1
    with pytest.raises(InputError, match="zero points other than 8"):
        FORMATS[name].decode(found, tensors)


def test_awq_symmetry_is_read_from_the_zeros() -> None:
    for sym in (True, False):
        config, tensors = folder(FORMATS["awq"], [layer(sym=sym)])
        assert read_back(FORMATS["awq"], config, tensors)[0].grid.sym == sym
    config["quantization_config"]["zero_point"] = False
    with pytest.raises(InputError, match="zero_point is false"):
        read_back(FORMATS["awq"], config, tensors)


@pytest.mark.parametrize(("columns", "version", "understood"), [
    (256, None, True), (256, "0.20.0", True), (256, "0.17.1", False),
    (40, "0.18.0", True), (40, None, True), (10, None, True),
])  # fmt: skip
def test_streams_of_three_bits(columns: int, version: str | None, understood: bool) -> None:
    config, tensors = folder(FORMATS[CT], [layer((64, columns), 3, -1)])
    if version:
        config["quantization_config"]["version"] = version
    if understood:
        assert read_back(FORMATS[CT], config, tensors)[0].shape == (64, columns)
    else:
        with pytest.raises(InputError, match=r"before 0\.18 packed them"):
            read_back(FORMATS[CT], config, tensors)


@pytest.mark.parametrize("columns", [40, 256])
def test_streams_of_three_bits_of_old_versions(columns: int) -> None:
    """Ten codes to a word; at 40 columns as many words as now, but two bits of each are unused."""
    config, tensors = folder(FORMATS[CT], [layer((64, columns), 3, -1)])
    old = np.full((64, -(-columns // 10)), 0x3FFFFFFF, np.int32)
    tensors[f"{DOWN}.weight_packed"] = old
    with pytest.raises(InputError, match=r"before 0\.18 packed them|ask for"):
        read_back(FORMATS[CT], config, tensors)


def test_compressed_tensors_scalar_input_scale_and_int32_shape() -> None:
    own = layer(group_size=-1, activation=Activation(dynamic=False))
    config, tensors = folder(FORMATS[CT], [own])
    tensors[f"{DOWN}.input_scale"] = tensors[f"{DOWN}.input_scale"].reshape(())
    tensors[f"{DOWN}.weight_shape"] = tensors[f"{DOWN}.weight_shape"].astype(np.int32)
    (found,) = read_back(FORMATS[CT], config, tensors)
    assert found.activation == Activation(dynamic=False)
    assert FORMATS[CT].decode(found, tensors).input_scale == 0.25


def test_compressed_tensors_weight_shape_is_compared() -> None:
    config, tensors = folder(FORMATS[CT], [layer()])
    (found,) = read_back(FORMATS[CT], config, tensors)
    tensors[f"{DOWN}.weight_shape"] = np.array([64, 120])
    with pytest.raises(InputError, match=r"says \[64, 120\], the weight is \[64, 128\]"):
        FORMATS[CT].decode(found, tensors)


def test_onnx_nodes() -> None:
    own = layer((64, 200), 2, 16, sym=False, scale_dtype="float32")
    _, tensors = folder(FORMATS["onnx"], [own])
    metadata = FORMATS["onnx"].metadata([own])
    assert metadata == {DOWN: {"K": 200, "N": 64, "bits": 2, "block_size": 16, "accuracy_level": 0}}
    for broken, message in (
        ({}, "node is missing"),
        ({DOWN: metadata[DOWN] | {"K": 300}}, "asks for"),
        ({DOWN: metadata[DOWN] | {"bits": 3}}, "3 bits"),
    ):
        with pytest.raises(InputError, match=message):
            read_back(FORMATS["onnx"], {}, tensors, broken)
