"""Mirrored groups of symmetric grids: what each layout stores is what its definition says, read
here bit by bit; and a negative scale in somebody else's folder is a mirrored group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Contents
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from tests.formats.cases import FORMATS, folder, layer, read_back, rounded, specs_of

CT = "compressed-tensors"
MODULE = "model.layers.0.mlp.down_proj"
Weight = NDArray[np.float64]


def stream(words: Array, place: int, bits: int) -> int:
    """Code `place` of a stream of 32-bit words, lowest bit first."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words))
    return number >> (place * bits) & (2**bits - 1)


def by_points(shape: tuple[int, int], value: Callable[[int, int], float]) -> Weight:
    return np.array([[value(row, column) for column in range(shape[1])] for row in range(shape[0])])


def gptq(own: Layer, stored: Mapping[str, Array], plus: int) -> Weight:
    """`W[n, k] = scales[g, n] · (code − zero)`; the first version stores zeros minus one."""
    bits, qweight, qzeros = own.grid.bits, stored["qweight"], stored["qzeros"]

    def value(row: int, column: int) -> float:
        group = int(stored["g_idx"][column])
        zero = stream(qzeros[group], row, bits) + plus
        return float(stored["scales"][group, row]) * (stream(qweight[:, row], column, bits) - zero)

    return by_points(own.shape, value)


def awq(own: Layer, stored: Mapping[str, Array]) -> Weight:
    """Output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i] is nibble i of word c."""
    nibble = {output: place for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}

    def value(row: int, column: int) -> float:
        group, shift = column // own.grid.width(own.shape[1]), 4 * nibble[row % 8]
        code, zero = (
            int(stored[name][place, row // 8]) >> shift & 15
            for name, place in (("qweight", column), ("qzeros", group))
        )
        return float(stored["scales"][group, row]) * (code - zero)

    return by_points(own.shape, value)


def compressed(own: Layer, stored: Mapping[str, Array]) -> Weight:
    """Without zero points, the middle is zero."""
    bits, width = own.grid.bits, own.grid.width(own.shape[1])

    def value(row: int, column: int) -> float:
        code = stream(stored["weight_packed"][row], column, bits) - 2 ** (bits - 1)
        return float(stored["weight_scale"][row, column // width]) * code

    return by_points(own.shape, value)


def mlx(own: Layer, stored: Mapping[str, Array]) -> Weight:
    """`scale · code + bias`."""

    def value(row: int, column: int) -> float:
        group = column // own.grid.group_size
        scale, bias = (float(stored[name][row, group]) for name in ("scales", "biases"))
        return scale * stream(stored["weight"][row], column, own.grid.bits) + bias

    return by_points(own.shape, value)


def gguf(own: Layer, stored: Mapping[str, Array]) -> Weight:
    """Blocks of 32 columns: d as float16, at 5 bits a word of fifth bits, then nibbles or int8."""
    bits, size = own.grid.bits, {4: 18, 5: 22, 8: 34}[own.grid.bits]

    def value(row: int, column: int) -> float:
        block = bytes(stored["weight"][row])[column // 32 * size :][:size]
        d, place = float(np.frombuffer(block[:2], "<f2")[0]), column % 32
        if bits == 8:
            return d * int(np.int8(np.uint8(block[2 + place])))
        nibbles = block[-16:]
        code = nibbles[place % 16] >> (4 if place >= 16 else 0) & 15
        if bits == 5:
            code += (int.from_bytes(block[2:6], "little") >> place & 1) * 16
        return d * (code - 2 ** (bits - 1))

    return by_points(own.shape, value)


def onnx(own: Layer, stored: Mapping[str, Array]) -> Weight:
    """Bytes, the lowest code first; a missing zero point is the middle."""
    bits, size = own.grid.bits, own.grid.group_size
    assert "MatMul.qzeros" not in stored

    def value(row: int, column: int) -> float:
        block, place = column // size, column % size
        byte = int(stored["MatMul.qweight"][row, block, place * bits // 8])
        code = byte >> (place * bits % 8) & (2**bits - 1)
        return float(stored["MatMul.scales"][row, block]) * (code - 2 ** (bits - 1))

    return by_points(own.shape, value)


BY_DEFINITION: dict[str, Callable[[Layer, Mapping[str, Array]], Weight]] = {
    "gptq": lambda own, stored: gptq(own, stored, 1),
    "gptq_v2": lambda own, stored: gptq(own, stored, 0),
    "awq": awq,
    CT: compressed,
    "mlx": mlx,
    "gguf": gguf,
    "onnx": onnx,
}
SCALES = {"gptq": "scales", "gptq_v2": "scales", "awq": "scales", CT: "weight_scale",
          "mlx": "scales", "onnx": "MatMul.scales"}  # fmt: skip
LAYERS = [
    *((name, layer((32, 64), bits)) for name in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)),
    ("gptq", layer((32, 64), 3, 16, reordered=True)),
    ("gptq", layer((32, 64), 4, -1)),
    ("awq", layer((16, 64))),
    *((CT, layer((5, 64), bits)) for bits in range(2, 9)),
    (CT, layer((5, 13), 3, -1, scale_dtype="bfloat16", dtype="BF16")),
    *(("mlx", layer((5, 64), bits)) for bits in (2, 3, 4, 5, 6, 8)),
    ("mlx", layer((5, 64), scale_dtype="bfloat16")),
    *(("gguf", layer((5, 96), bits)) for bits in (4, 5, 8)),
    ("gguf", layer((5, 96), 4, 64)),
    ("gguf", layer((5, 96), 8, 0)),
    *(("onnx", layer((5, 72), bits, scale_dtype="float32")) for bits in (2, 4, 8)),
    ("onnx", layer((5, 72), 4, 16)),
]  # fmt: skip


def named(own: Layer, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {name.removeprefix(f"{own.module}."): values for name, values in tensors.items()}


def mirrored(own: Layer) -> Layer:
    return replace(own, grid=replace(own.grid, mirrored=True))


def equal(one: QuantizedWeight, other: QuantizedWeight) -> None:
    for field in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)
        assert getattr(one, field).dtype == getattr(other, field).dtype
    np.testing.assert_array_equal(one.column_groups(), other.column_groups())


def weight_of(own: Layer) -> QuantizedWeight:
    """Random, both kinds of groups, and both ends of the codes in each."""
    weight = rounded(own, seed=3)
    weight.codes[:, ::7], weight.codes[:, 1::7] = 0, own.grid.max_code
    if weight.zeros.size > 1:
        weight.zeros.flat[:2] = own.grid.mid_code - 1, own.grid.mid_code
    else:
        weight.zeros[:] = own.grid.mid_code - 1
    return weight


@pytest.mark.parametrize(("name", "own"), LAYERS)
def test_stored_as_the_layout_defines_it(name: str, own: Layer) -> None:
    record, own = FORMATS[name], mirrored(own)
    assert record.misfit(own) is None
    assert record.mirrored(own)
    weight = weight_of(own)
    tensors = record.encode(own, weight)
    assert specs_of(tensors) == {spec.name: spec for spec in record.specs(own)}
    found = BY_DEFINITION[name](own, named(own, tensors))
    np.testing.assert_array_equal(found.astype(np.float32), weight.dequantized())
    assert (found > 0).any()
    assert (found < 0).any()
    equal(record.decode(own, tensors), weight)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", CT, "onnx"])
def test_the_zero_of_all_is_the_middle(name: str) -> None:
    """Kernels of symmetric grids read no zeros; where some are stored they are those of all."""
    own = mirrored(layer((32, 64)))
    tensors = named(own, FORMATS[name].encode(own, weight_of(own)))
    plain = named(own, FORMATS[name].encode(layer((32, 64)), rounded(layer((32, 64)))))
    assert tensors.keys() == plain.keys()
    if name.startswith("gptq"):
        np.testing.assert_array_equal(tensors["qzeros"], plain["qzeros"])
    assert (tensors[SCALES[name]] < 0).mean() > 0.25


def test_awq_kernels_read_zeros() -> None:
    own = mirrored(layer((16, 64)))
    tensors = named(own, FORMATS["awq"].encode(own, weight_of(own)))
    assert (tensors["scales"] > 0).all()
    assert {(int(word) & 0xFFFFFFFF) >> shift & 15 for word in tensors["qzeros"].flat
            for shift in range(0, 32, 4)} == {7, 8}  # fmt: skip


@pytest.mark.parametrize("name", list(SCALES))
def test_negative_scales_of_others(name: str) -> None:
    """As AutoRound writes them over its whole symmetric range."""
    own = layer((32, 64), scale_dtype="float32" if name == "onnx" else "float16")
    config, tensors = folder(FORMATS[name], [own])
    signs = np.random.default_rng(0).choice([-1, 1], tensors[f"{MODULE}.{SCALES[name]}"].shape)
    for key in (SCALES[name], "biases"):
        if (values := tensors.get(f"{MODULE}.{key}")) is not None:
            tensors[f"{MODULE}.{key}"] = (values * signs).astype(values.dtype)
    (found,) = read_back(FORMATS[name], config, tensors, FORMATS[name].metadata([own]))
    assert found.grid.mirrored == (name != "mlx")  # which does not say that it is symmetric
    weight = FORMATS[name].decode(found, tensors)
    assert (weight.scales > 0).all()
    shown = signs if weight.scales.shape == signs.shape else signs.T
    np.testing.assert_array_equal(weight.zeros, np.where(shown < 0, 7, 8))
    expected = BY_DEFINITION[name](own, named(own, tensors)).astype(np.float32)
    np.testing.assert_array_equal(weight.dequantized(), expected)
    if name != "awq":  # which comes back with zeros
        for key, values in FORMATS[name].encode(found, weight).items():
            assert values.tobytes() == tensors[key].tobytes(), key


def test_negative_scales_of_llama_cpp() -> None:
    """A zero block has d = −0: the same bytes come back."""
    spec = TensorSpec("blk.0.attn_q.weight", "Q4_0", (5, 96))
    contents = Contents({"general.architecture": "llama"}, {}, {f"{MODULE}.weight": spec}, dict.get)
    (found,) = FORMATS["gguf"].layers(contents)
    assert found.grid.mirrored
    data = np.random.default_rng(0).integers(0, 256, (5, 54)).astype(np.uint8)
    scales = np.array([0.5, -0.25, -0.0] * 5, "<f2")
    data.reshape(15, 18)[:, :2] = scales.view(np.uint8).reshape(15, 2)
    tensors = {f"{MODULE}.weight": data}
    weight = FORMATS["gguf"].decode(found, tensors)
    assert set(weight.scales.flat) == {0.5, 0.25, 0.0}
    assert not np.signbit(weight.scales).any()
    np.testing.assert_array_equal(weight.dequantized(), gguf(found, {"weight": data}))
    assert FORMATS["gguf"].encode(found, weight)[f"{MODULE}.weight"].tobytes() == data.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_not_finite_stays_so(dtype: str) -> None:
    """Whoever loads it refuses it, with the folder's name."""
    own = mirrored(layer((5, 64), scale_dtype=dtype, dtype={"float16": "F16"}.get(dtype, "BF16")))
    tensors = FORMATS[CT].encode(own, weight_of(own))
    stored = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    tensors[f"{MODULE}.weight_scale"][0] = np.array([-np.nan, -np.inf], stored)
    assert not np.isfinite(FORMATS[CT].decode(own, tensors).scales[0].astype(float)).any()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("change", [
    {"activation": Activation()},
    {"grid": {"narrow_range": True}},
    {"grid": {"sym": False}},
])  # fmt: skip
def test_never_mirrored(name: str, change: dict[str, Any]) -> None:
    own = layer((32, 64), 8, -1)
    if "grid" in change:
        change = {"grid": replace(own.grid, **change["grid"])}
    assert FORMATS[name].mirrored(own)
    assert not FORMATS[name].mirrored(replace(own, **change))


def test_rounded_inputs_keep_the_scales_they_have() -> None:
    """Somebody's W8A8 with a negative scale: kernels of integers have no other zero to offer."""
    own = layer((8, 64), 8, -1, activation=Activation())
    config, tensors = folder(FORMATS[CT], [own])
    before = FORMATS[CT].decode(own, tensors)
    tensors[f"{MODULE}.weight_scale"] = -tensors[f"{MODULE}.weight_scale"]
    (found,) = read_back(FORMATS[CT], config, tensors)
    assert not found.grid.mirrored
    weight = FORMATS[CT].decode(found, tensors)
    np.testing.assert_array_equal(weight.dequantized(), -before.dequantized())
    assert (weight.zeros == 128).all()


def test_awq_zeros_of_seven_and_eight_are_a_mirrored_grid() -> None:
    own = mirrored(layer((32, 64)))
    config, tensors = folder(FORMATS["awq"], [own])
    (found,) = read_back(FORMATS["awq"], config, tensors)
    assert found.grid == own.grid
    tensors[f"{MODULE}.qzeros"][0, 0] ^= 1  # 7 to 6, or 8 to 9
    (found,) = read_back(FORMATS["awq"], config, tensors)
    assert not found.grid.sym
    assert not found.grid.mirrored
    config["quantization_config"]["zero_point"] = False
    with pytest.raises(InputError, match="zero_point is false"):
        read_back(FORMATS["awq"], config, tensors)


def test_a_wrong_zero_is_not_written_in_silence() -> None:
    """A symmetric layer whose zeros are neither: what comes back differs, and the run stops."""
    own = mirrored(layer((32, 64)))
    weight = weight_of(own)
    weight.zeros[0, 0] = 3
    for name in (CT, "gguf"):
        back = FORMATS[name].decode(own, FORMATS[name].encode(own, weight))
        assert back.zeros[0, 0] == 8
    for name in ("gptq", "gptq_v2"):
        with pytest.raises(InputError, match="zero points other than 8"):
            FORMATS[name].decode(own, FORMATS[name].encode(own, weight))


def test_mlx_keeps_a_mirrored_grid_exact() -> None:
    """−7 · scale would be rounded; 8 · scale is not. Also where nobody says it is symmetric."""
    own = mirrored(layer((8, 64), scale_dtype="bfloat16", dtype="BF16"))
    weight = weight_of(own)
    asymmetric = replace(own, grid=replace(own.grid, sym=False, mirrored=False))
    ours = FORMATS["mlx"].encode(own, weight)
    again = FORMATS["mlx"].encode(asymmetric, replace(weight, grid=asymmetric.grid))
    for key, values in ours.items():
        assert values.tobytes() == again[key].tobytes()
    back = FORMATS["mlx"].decode(asymmetric, ours)
    assert back.offsets is None
    equal(back, weight)
    assert not back.grid.sym
