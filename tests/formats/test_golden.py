"""Every golden vector: our encoder gives the peer's bytes, our decoder the peer's codes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Contents, Format
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import gguf
from ptq_cli.formats.gguf.types import TYPES as BLOCK_TYPES
from ptq_cli.storage.gguf_file import TYPES
from tests.formats.cases import FORMATS, GOLDEN, VECTORS, golden, unmirrored, vectors

MODULE = "model.layers.0.self_attn.q_proj"


def make(
    info: dict[str, Any], tensors: dict[str, Array], scales: Array, **more: Any
) -> tuple[Layer, QuantizedWeight]:
    shape = tensors["codes"].shape
    sym = bool(info.get("sym", False))
    grid = Grid(
        info["bits"], info.get("group_size", 32), sym, scale_dtype=scales.dtype.name,
        mirrored=sym and "activation" not in more,
    )  # fmt: skip
    word = {"float16": "F16", "float32": "F32"}[scales.dtype.name]
    layer = Layer(MODULE, f"{MODULE}.weight", shape, shape, word, grid)
    layer = replace(layer, **more)
    weight = QuantizedWeight(
        codes=tensors["codes"].astype(np.uint8),
        scales=scales,
        zeros=tensors["zeros"].astype(np.uint8),
        grid=grid,
        g_idx=tensors["g_idx"] if layer.reordered else None,
    )
    return layer, unmirrored(weight) if grid.mirrored else weight


def check(
    record: Format, layer: Layer, weight: QuantizedWeight, peer: dict[str, Array], dequant: Array
) -> None:
    """Encode, compare each tensor with the peer's bytes; decode the peer's, compare values."""
    assert record.misfit(layer) is None
    ours = record.encode(layer, weight)
    named = {f"{MODULE}.{name}": values for name, values in peer.items()}
    assert ours.keys() == named.keys() == {spec.name for spec in record.specs(layer)}
    for spec in record.specs(layer):
        assert ours[spec.name].shape == spec.shape
        assert ours[spec.name].flags.c_contiguous
        assert ours[spec.name].dtype == named[spec.name].dtype
        assert ours[spec.name].tobytes() == named[spec.name].tobytes(), spec.name
    back = record.decode(layer, named)
    np.testing.assert_array_equal(back.codes, weight.codes)
    np.testing.assert_array_equal(back.zeros, weight.zeros)
    np.testing.assert_array_equal(back.scales, weight.scales)
    np.testing.assert_array_equal(back.column_groups(), weight.column_groups())
    np.testing.assert_array_equal(back.dequantized(), dequant)


@pytest.mark.parametrize("name", vectors("gptq"))
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(name: str, version: int) -> None:
    info, tensors = golden(name)
    layer, weight = make(info, tensors, tensors["scales_ng"], reordered=info["desc_act"])
    peer = {key: tensors[key] for key in ("qweight", "scales", "g_idx")}
    peer["qzeros"] = tensors[f"qzeros_v{version}"]
    record = FORMATS["gptq" if version == 1 else "gptq_v2"]
    if version == 2 or layer.grid.sym:
        check(record, layer, weight, peer, tensors["dequant"])
    elif (weight.zeros == 0).any():
        with pytest.raises(InputError, match="--format gptq_v2"):
            record.encode(layer, weight)
    else:  # asymmetric v1 is read, though not written
        back = record.decode(layer, {f"{MODULE}.{key}": value for key, value in peer.items()})
        np.testing.assert_array_equal(back.dequantized(), tensors["dequant"])


@pytest.mark.parametrize("name", vectors("awq"))
def test_awq(name: str) -> None:
    info, tensors = golden(name)
    layer, weight = make(info, tensors, tensors["scales_ng"])
    peer = {key: tensors[key] for key in ("qweight", "qzeros", "scales")}
    check(FORMATS["awq"], layer, weight, peer, tensors["dequant"])


@pytest.mark.parametrize("name", vectors("ct"))
def test_compressed_tensors(name: str) -> None:
    info, tensors = golden(name)
    activation = Activation() if name.startswith("ct_int8") else None
    own = {} if activation is None else {"activation": activation}
    layer, weight = make(info, tensors, tensors["weight_scale"], **own)
    peer = {key: value for key, value in tensors.items() if key.startswith("weight")}
    check(FORMATS["compressed-tensors"], layer, weight, peer, tensors["dequant"])


@pytest.mark.parametrize("name", vectors("onnx"))
def test_onnx(name: str) -> None:
    info, tensors = golden(name)
    layer, weight = make(info, tensors, tensors["scales"])
    peer = {"MatMul.qweight": tensors["packed"], "MatMul.scales": tensors["scales"]}
    if not info["sym"]:
        peer["MatMul.qzeros"] = tensors["zero_points"]
    check(FORMATS["onnx"], layer, weight, peer, tensors["dequant"])


@pytest.mark.parametrize("name", vectors("mlx"))
def test_mlx(name: str) -> None:
    """mx.quantize chooses offsets freely: they come back as offsets, and encode to its bytes."""
    info, tensors = golden(name)
    tensors["zeros"] = np.zeros_like(tensors["scales"])
    layer, _ = make(info, tensors, tensors["scales"])
    record = FORMATS["mlx"]
    peer = {f"{MODULE}.{key}": tensors[key] for key in ("weight", "scales", "biases")}
    back = record.decode(layer, peer)
    expected = replace(
        back, codes=tensors["codes"].astype(np.uint8), scales=tensors["scales"],
        zeros=np.full_like(back.zeros, layer.grid.mid_code),
    )  # fmt: skip
    if back.offsets is None and (expected.scales * layer.grid.mid_code == -tensors["biases"]).all():
        expected = unmirrored(expected)  # symmetric by chance: its zeros are all in the middle
    np.testing.assert_array_equal(back.codes, expected.codes)
    np.testing.assert_array_equal(back.scales, expected.scales)
    # MLX multiplies and adds in one rounding
    np.testing.assert_allclose(back.dequantized(), tensors["dequant"], rtol=1e-6, atol=1e-6)
    for key, values in record.encode(layer, back).items():
        assert values.dtype == peer[key].dtype
        assert values.tobytes() == peer[key].tobytes()


@pytest.mark.parametrize("name", vectors("gguf"))
def test_gguf(name: str) -> None:
    info, tensors = golden(name)
    kind = BLOCK_TYPES[info["type_name"]]
    assert TYPES[info["ggml_type"]] == (kind.name, gguf.BLOCK, info["bytes_per_block"])
    assert kind.nbytes == info["bytes_per_block"]
    shape, sym = tensors["codes"].shape, kind.grid.sym
    grid = Grid(kind.grid.bits, 32, sym, mirrored=sym)
    layer = Layer(MODULE, f"{MODULE}.weight", shape, shape, "F16", grid)
    record, peer = FORMATS["gguf"], {f"{MODULE}.weight": tensors["packed"]}
    back = record.decode(layer, peer)
    unsigned = tensors["codes"].astype(np.int16) + (128 if grid.bits == 8 else 0)
    peer_codes = replace(
        back, codes=unsigned.astype(np.uint8), scales=tensors["scales"],
        zeros=np.full_like(back.zeros, grid.mid_code),
    )  # fmt: skip
    expected = unmirrored(peer_codes) if sym else peer_codes
    np.testing.assert_array_equal(back.codes, expected.codes)
    np.testing.assert_array_equal(back.scales, expected.scales)
    if sym:
        np.testing.assert_array_equal(back.zeros, expected.zeros)
    np.testing.assert_array_equal(back.dequantized(), tensors["dequant"])
    assert record.encode(layer, back)[f"{MODULE}.weight"].tobytes() == tensors["packed"].tobytes()


def stored(info: dict[str, Any], packed: Array) -> Layer:
    """A layer whose rows are such blocks, as a file's header tells it."""
    shape = (len(packed), packed.shape[1] // info["bytes_per_block"] * info["block"])
    spec = TensorSpec(f"{MODULE}.weight", info["type_name"], shape)
    found = {"general.architecture": "llama"}
    (own,) = gguf.FORMAT.layers(Contents(found, {}, {spec.name: spec}, lambda name: np.empty(0)))
    return own


@pytest.mark.parametrize("part", ["", "random"])
@pytest.mark.parametrize("name", vectors("ggml"))
def test_ggml(name: str, part: str) -> None:
    """Fields at random, too: d negative, subnormal, zero, huge."""
    info, tensors = golden(name)
    packed = tensors[part or "packed"]
    values = tensors[f"{part}_dequant" if part else "dequant"]
    own = stored(info, packed)
    if own.grid.sym:
        own = replace(own, grid=replace(own.grid, mirrored=gguf.FORMAT.mirrored(own)))
    assert gguf.FORMAT.misfit(own) is None
    assert TYPES[info["ggml_type"]] == (info["type_name"], info["block"], info["bytes_per_block"])
    assert [spec.shape for spec in gguf.FORMAT.specs(own)] == [packed.shape]
    back = gguf.FORMAT.decode(own, {f"{MODULE}.weight": packed})
    assert back.grid == own.grid
    np.testing.assert_array_equal(back.dequantized(), values)
    ours = gguf.FORMAT.encode(own, back)[f"{MODULE}.weight"]
    if name == "ggml_nvfp4" and part:  # 0x7F, which is no number, ggml reads as zero
        scales = packed.view(BLOCK_TYPES["NVFP4"].parts)["d"]
        assert (scales == 0x7F).sum() == 1
        scales[scales == 0x7F] = 0
    np.testing.assert_array_equal(ours, packed)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_numbers_of_super_blocks(name: str) -> None:
    """Codes, multiples and floats where the solver wants them, in the simplest of words."""
    info, tensors = golden(f"ggml_{name.lower()}")
    own = stored(info, tensors["packed"])
    back = gguf.FORMAT.decode(own, {f"{MODULE}.weight": tensors["packed"]})
    wide = own.grid.group_size
    for row, column in ((0, 0), (1, 255), (2, 256), (3, 511), (1, 100)):
        block, group, level = column // 256, column // wide, int(back.codes[row, column])
        d = np.float32(back.super_scales[row, block])
        scale = np.float32(d * np.float32(back.scales[row, group]))
        if name == "IQ4_XS":
            value = scale * own.grid.table[level]
        elif back.super_offsets is None:
            value = scale * np.float32(level - int(back.zeros[row, group]))
        else:
            dmin = np.float32(back.super_offsets[row, block])
            value = scale * np.float32(level) - dmin * np.float32(back.offsets[row, group])
        assert value == tensors["dequant"][row, column]
    low, high = own.grid.multiples
    assert low <= back.scales.min() <= back.scales.max() <= high
    assert back.scales.dtype == (np.int8 if low < 0 else np.uint8)
    assert back.scales.shape == own.grid.scales_shape(own.shape)
    assert back.super_scales.dtype == np.float16


@pytest.mark.parametrize("name", list(VECTORS))
def test_vectors_are_whole(name: str) -> None:
    data = (GOLDEN / VECTORS[name]["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == VECTORS[name]["sha256"]
