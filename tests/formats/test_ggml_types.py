"""ggml's types: bytes and numbers there and back, in GGUF and in the native format; what holds them
and what does not; bytes that mean no number."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Contents
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats import gguf, ptq
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.registry import format_named
from ptq_cli.run.nearest import same_weight
from tests.formats.cases import layer, rounded, specs_of
from tests.formats.ggml_weights import DOWN, ggml_layer, ggml_weight, same_numbers

NAMES = tuple(TYPES)
WEIGHT = f"{DOWN}.weight"


def from_header(name: str, own: Layer, entry: dict[str, Any] | None = None) -> Layer:
    """The layer that a GGUF file tells, with the key `ptq`."""
    spec = TensorSpec(own.tensor, name, own.shape)
    metadata = {"general.architecture": "llama", "ptq": {own.module: entry or {}}}
    contents = Contents(metadata, {}, {own.tensor: spec}, lambda name: np.empty(0))
    (found,) = gguf.FORMAT.layers(contents)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_encode_then_decode(name: str) -> None:
    own = ggml_layer(name)
    assert gguf.block_type(own.grid) is TYPES[name]
    assert gguf.FORMAT.misfit(own) is None
    weight = ggml_weight(own)
    tensors = gguf.FORMAT.encode(own, weight)
    assert specs_of(tensors) == {spec.name: spec for spec in gguf.FORMAT.specs(own)}
    back = gguf.FORMAT.decode(own, tensors)
    same_numbers(back, weight)
    assert same_weight(back, weight)
    declared = gguf.FORMAT.metadata([own])[own.module]
    told = from_header(name, own, json.loads(json.dumps(declared)))
    assert replace(told.grid, mirrored=False) == own.grid


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_rows(name: str) -> None:
    own = ggml_layer(name)
    assert gguf.FORMAT.by_rows(own)
    weight = ggml_weight(own)
    whole = gguf.FORMAT.encode(own, weight)[WEIGHT]
    part = replace(own, shape=(2, 512), full_shape=(2, 512))
    rows = gguf.FORMAT.encode(part, weight.panel(slice(3, 5)))[WEIGHT]
    np.testing.assert_array_equal(rows, whole[3:5])
    none = replace(own, shape=(0, 512), full_shape=(0, 512))
    empty = gguf.FORMAT.encode(none, weight.panel(slice(0, 0)))
    assert empty[WEIGHT].shape == (0, whole.shape[1])
    assert gguf.FORMAT.decode(none, empty).codes.shape == (0, 512)


@pytest.mark.parametrize("name", NAMES)
def test_native_format(name: str) -> None:
    own = ggml_layer(name)
    assert ptq.FORMAT.misfit(own) is None
    weight = ggml_weight(own)
    tensors = ptq.FORMAT.encode(own, weight)
    assert specs_of(tensors) == {spec.name: spec for spec in ptq.FORMAT.specs(own)}
    metadata = json.loads(json.dumps(ptq.FORMAT.metadata([own])))
    contents = Contents(metadata, {}, specs_of(tensors), tensors.__getitem__)
    (found,) = ptq.FORMAT.layers(contents)
    assert found == own
    same_numbers(ptq.FORMAT.decode(found, tensors), weight)
    back = gguf.FORMAT.encode(own, ptq.FORMAT.decode(found, tensors))[WEIGHT]
    np.testing.assert_array_equal(back, gguf.FORMAT.encode(own, weight)[WEIGHT])


def test_two_weights_that_differ_in_one_number_are_not_the_same() -> None:
    for name in NAMES:
        weight = ggml_weight(ggml_layer(name))
        for part in ("codes", "scales", "offsets", "super_scales", "super_offsets"):
            values = getattr(weight, part)
            if values is not None:
                changed = values.copy()
                changed.view(f"u{values.itemsize}")[-1, -1] ^= 1
                assert not same_weight(weight, replace(weight, **{part: changed})), (name, part)


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_1"), (5, "Q5_1")])
def test_offsets_of_zeros_and_own_ones_are_one_type(bits: int, name: str) -> None:
    own, plain = ggml_layer(name), layer((6, 512), bits, 32, sym=False)
    assert gguf.block_type(plain.grid) is gguf.block_type(own.grid) is TYPES[name]
    weight = ggml_weight(own)
    foreign = from_header(name, own)  # no key says whose offsets they are
    assert foreign.grid == plain.grid
    tensors = gguf.FORMAT.encode(own, weight)
    back = gguf.FORMAT.decode(foreign, tensors)
    np.testing.assert_array_equal(back.offsets, weight.offsets)
    np.testing.assert_array_equal(back.dequantized(), weight.dequantized())
    assert back.zeros.any()
    exact = replace(weight, offsets=(-3 * weight.scales).astype(np.float16))
    scales = np.exp2(np.rint(np.log2(weight.scales.astype(np.float32)))).astype(np.float16)
    exact = replace(exact, scales=scales, offsets=-3 * scales)
    found = gguf.FORMAT.decode(foreign, gguf.FORMAT.encode(own, exact))
    assert found.offsets is None
    assert (found.zeros == 3).all()
    kept = gguf.FORMAT.decode(own, gguf.FORMAT.encode(own, exact))
    same_numbers(kept, exact)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "IQ4_NL"])
def test_wider_groups_repeat_their_scale(name: str) -> None:
    own = ggml_layer(name)
    own = replace(own, grid=replace(own.grid, group_size=128))
    weight = ggml_weight(own)
    back = gguf.FORMAT.decode(own, gguf.FORMAT.encode(own, weight))
    same_numbers(back, weight)
    np.testing.assert_array_equal(back.dequantized(), weight.dequantized())


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_1"])
@pytest.mark.parametrize("other", ["gptq", "gptq_v2", "awq", "compressed-tensors", "mlx", "onnx"])
def test_other_formats_refuse_them(name: str, other: str) -> None:
    misfit = format_named(other).misfit(ggml_layer(name, (64, 512)))
    assert misfit is not None
    words = {
        "IQ4_NL": ", not levels of IQ4; --format gguf",
        "IQ4_XS": ", not levels of IQ4; --format gguf",
        "Q4_1": "whole zeros, not offsets of any size .Q4_1, Q5_1.; --format gguf",
    }.get(name, "no scales that are multiples of another .K-quants, IQ4_XS.; --format gguf")
    assert re.search(rf"{words}|bits, not \d; --bits", f"{misfit.reason}; {misfit.hint}"), misfit


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (ggml_layer("Q4_K", (8, 576)), "Q4_K holds in_features in multiples of 256, not 576"),
        (ggml_layer("IQ4_XS", (8, 96)), "IQ4_XS holds in_features in multiples of 256, not 96"),
        (ggml_layer("NVFP4", (8, 96)), "NVFP4 holds in_features in multiples of 64, not 96"),
        (ggml_layer("MXFP4", (8, 40)), "MXFP4 holds in_features in multiples of 32, not 40"),
    ],
)
def test_widths(own: Layer, words: str) -> None:
    misfit = gguf.FORMAT.misfit(own)
    assert misfit is not None
    assert misfit.reason == words


@pytest.mark.parametrize("change", [{"group_size": 64}, {"bits": 3}, {"own_offsets": False}])
def test_grids_that_are_no_type(change: dict[str, Any]) -> None:
    own = ggml_layer("Q4_K")
    misfit = gguf.FORMAT.misfit(replace(own, grid=replace(own.grid, **change)))
    assert misfit is not None
    assert re.search(r"gguf has no type for \d bits", misfit.reason)


def test_the_native_format_wants_whole_super_blocks() -> None:
    misfit = ptq.FORMAT.misfit(ggml_layer("Q4_K", (8, 576)))
    assert misfit is not None
    assert "256 columns, which do not divide in_features 576" in misfit.reason


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Q4_K", {"sym": True}),
        ("Q4_K", {"group_size": 64}),
        ("Q4_K", {"scale_dtype": "uint5"}),
        ("Q6_K", {"mirrored": True}),
        ("IQ4_NL", {"bits": 5}),
        ("IQ4_NL", {"levels": "iq5"}),
        ("IQ4_XS", {"scale_dtype": "e4m3"}),
        ("MXFP4", {"own_offsets": True}),
    ],
)
def test_damaged_metadata_of_the_native_format(name: str, change: dict[str, Any]) -> None:
    own = ggml_layer(name)
    metadata = json.loads(json.dumps(ptq.FORMAT.metadata([own])))
    metadata[DOWN] |= change
    specs = {spec.name: spec for spec in ptq.FORMAT.specs(own)}
    with pytest.raises(InputError, match="its entry in the metadata is damaged"):
        ptq.FORMAT.layers(Contents(metadata, {}, specs, lambda name: np.empty(0)))


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [("Q4_K", "scales", 64), ("Q2_K", "offsets", 16), ("Q3_K", "scales", 32)],
)
def test_multiples_that_their_bits_do_not_hold(name: str, part: str, value: int) -> None:
    own = ggml_layer(name)
    tensors = ptq.FORMAT.encode(own, ggml_weight(own))
    tensors[f"{DOWN}.{part}"][2, 3] = value
    with pytest.raises(InputError, match=rf"{part}' holds .* {value}, not "):
        ptq.FORMAT.decode(own, tensors)


BAD = [
    (name, part, value)
    for name, kind in TYPES.items()
    for part, word, _ in kind.layout
    if word == "<f2"
    for value in (np.inf, -np.inf, np.nan)
] + [("MXFP4", "d", 255), ("NVFP4", "d", 0x81), ("NVFP4", "d", 0xFF)]


@pytest.mark.parametrize(("name", "part", "value"), BAD)
def test_what_is_not_finite_is_refused_by_name(name: str, part: str, value: float) -> None:
    own = ggml_layer(name)
    data = gguf.FORMAT.encode(own, ggml_weight(own))[WEIGHT]
    blocks = data.view(TYPES[name].parts)
    blocks[part][4, 1] = value
    said = f"the byte {value:#x}" if isinstance(value, int) else str(value)
    words = f"tensor '{WEIGHT}': {part} of block 1 of row 4 is {said}, no finite number"
    with pytest.raises(InputError, match=re.escape(words)):
        gguf.FORMAT.decode(own, {WEIGHT: data})


def test_zeros_of_scales_are_numbers() -> None:
    """d of zero, E8M0's least, E4M3's zero and what is no number there: as llama.cpp reads them."""
    for name, kind in TYPES.items():
        own = ggml_layer(name)
        data = gguf.FORMAT.encode(own, ggml_weight(own))[WEIGHT]
        blocks = data.view(kind.parts)
        for part in ("d", "m", "dmin"):
            if part in blocks.dtype.names:
                blocks[part] = 0
        back = gguf.FORMAT.decode(own, {WEIGHT: data})
        assert np.abs(back.dequantized()).max() <= (6 * 2.0**-127 if name == "MXFP4" else 0)
        np.testing.assert_array_equal(gguf.FORMAT.encode(own, back)[WEIGHT], data)
    blocks["d"] = 0x7F
    assert not gguf.FORMAT.decode(own, {WEIGHT: data}).dequantized().any()
    assert back.scales.dtype == ml_dtypes.float8_e4m3fn


def test_a_global_scale_is_refused() -> None:
    own = ggml_layer("NVFP4")
    weight = ggml_weight(own)
    scaled = replace(weight, grid=replace(weight.grid, global_scale=2.0))
    with pytest.raises(InputError, match="gguf has no global scale"):
        gguf.FORMAT.encode(own, scaled)


def test_a_key_that_contradicts_the_type() -> None:
    with pytest.raises(InputError, match="group_size 64 is not Q4_K's"):
        from_header("Q4_K", ggml_layer("Q4_K"), {"group_size": 64})
    with pytest.raises(InputError, match="own_offsets is 1, true or false was expected"):
        from_header("Q4_1", ggml_layer("Q4_1"), {"own_offsets": 1})


def test_flat_integers_may_have_been_rounded_to_zeros() -> None:
    """Asymmetric grids with whole zeros become Q4_1 as before, and only as a whole."""
    own = layer((4, 64), 4, 32, sym=False)
    assert not gguf.FORMAT.by_rows(own)
    assert gguf.FORMAT.specs(own)[0].shape == (4, 40)
    back = gguf.FORMAT.decode(own, gguf.FORMAT.encode(own, rounded(own)))
    assert same_weight(back, rounded(own))
    assert gguf.block_type(Grid(8)) is TYPES["Q8_0"]
