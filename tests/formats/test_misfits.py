"""What a format cannot hold, said with both numbers and an option that helps."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Layer
from tests.formats.cases import FORMATS, layer

EMBEDDING = "model.embed_tokens"

CASES = [
    ("gptq", layer(sym=False), "cannot hold a zero of 0; --format gptq_v2"),
    ("gptq", layer(bits=5), "2, 3, 4, 8 bits, not 5; --bits 4"),
    ("gptq", layer((520, 512), 3), "out_features in multiples of 32, not 520"),
    ("gptq", layer((64, 132), 4, -1), "in_features in multiples of 8, not 132"),
    ("gptq", layer((64, 320), group_size=128), "128 does not divide in_features 320.*-size 64"),
    ("gptq", layer((64, 72), group_size=48), "48 does not divide in_features 72.*--group-size -1"),
    ("gptq", layer(group_size=0), "whole tensor .group_size 0.; --group-size -1"),
    ("gptq", layer(scale_dtype="bfloat16"), "float16, not bfloat16; --scale-dtype float16"),
    ("gptq", layer(module=EMBEDDING), "embeddings; --ignore model.embed_tokens"),
    ("gptq_v2", layer(activation=Activation()), "not round inputs.*--format compressed"),
    ("gptq_v2", layer((60, 64), 2), "out_features in multiples of 16, not 60"),
    ("awq", layer(bits=8), "awq holds 4 bits, not 8; --bits 4"),
    ("awq", layer((60, 128)), "out_features in multiples of 8, not 60"),
    ("awq", layer((64, 320), group_size=128), "128 does not divide in_features 320"),
    ("awq", layer(reordered=True), "no g_idx.*--act-order static or --format gptq"),
    ("awq", layer(module="lm_head"), "leave lm_head dense; --ignore lm_head"),
    ("compressed-tensors", layer((64, 100)), "32 does not divide in_features 100.*--group-size -1"),
    ("compressed-tensors", layer(reordered=True), "no g_idx"),
    ("compressed-tensors", layer(group_size=0), "group_size 0.; --group-size -1"),
    ("compressed-tensors", layer(dtype="BF16"), "cannot hold float16; --scale-dtype bf"),
    ("compressed-tensors", layer(bits=8, activation=Activation()), "no groups of 32.*-size -1"),
    ("compressed-tensors", layer(activation=Activation(4)), "inputs to 8 bits here, not 4"),
    ("mlx", layer(bits=7), "2, 3, 4, 5, 6, 8 bits, not 7"),
    ("mlx", layer(group_size=-1), "no whole-row groups; --group-size 128"),
    ("mlx", layer(group_size=16), "groups of 32, 64, 128, not 16; --group-size 128"),
    ("mlx", layer((64, 100), group_size=64), "64 does not divide in_features 100, .*; None"),
    ("mlx", layer(reordered=True), "no g_idx"),
    ("mlx", layer(bits=8, sym=False, scale_dtype="bfloat16"), "whole step.*8 bits; --sym"),
    ("gguf", layer(bits=3), "4, 5, 8 bits, not 3; --bits 4"),
    ("gguf", layer(bits=8, sym=False), "asymmetric type of 8 bits; --sym"),
    ("gguf", layer((64, 100), group_size=-1), "in_features in multiples of 32, not 100"),
    ("gguf", layer(group_size=16), "blocks of 32 columns, not 16; --group-size 32"),
    ("gguf", layer(group_size=0, bits=2), "4, 5, 8 bits, not 2"),
    ("gguf", layer(reordered=True), "no g_idx"),
    ("onnx", layer(bits=3), "2, 4, 8 bits, not 3"),
    ("onnx", layer(group_size=-1), "no whole-row groups; --group-size 128"),
    ("onnx", layer(group_size=48), "groups of 16, 32, 64, 128, 256, not 48"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "own", "words"), CASES)
def test_misfit(name: str, own: Layer, words: str) -> None:
    misfit = FORMATS[name].misfit(own)
    assert misfit is not None
    assert re.search(words, f"{misfit.reason}; {misfit.hint}"), misfit


@pytest.mark.parametrize("name", list(FORMATS))
def test_matrices_only(name: str) -> None:
    misfit = FORMATS[name].misfit(replace(layer(), full_shape=(2, 32, 128)))
    assert misfit is not None
    assert "3 dimensions" in misfit.reason


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("gptq", layer(reordered=True)),
        ("gptq", layer(module="lm_head")),
        ("gptq_v2", layer(bits=3, sym=False, group_size=-1)),
        ("awq", layer(sym=False)),
        ("compressed-tensors", layer((60, 100), 3, -1, sym=False)),
        ("compressed-tensors", layer(bits=8, group_size=0, activation=Activation())),
        ("compressed-tensors", layer(activation=Activation())),
        ("mlx", layer(module=EMBEDDING, bits=6, sym=False)),
        ("gguf", layer(module=EMBEDDING, bits=5, sym=False)),
        ("gguf", layer((64, 160), group_size=128)),
        ("onnx", layer((64, 200), bits=2, group_size=16, sym=False)),
    ],
)
def test_held(name: str, own: Layer) -> None:
    assert FORMATS[name].misfit(own) is None


def test_scale_dtypes() -> None:
    for name, record in FORMATS.items():
        assert record.scale_dtype is not None
        for word in ("F64", "F32", "F16", "BF16"):
            dtype = record.scale_dtype(word)
            own = layer(dtype=word, scale_dtype=dtype)
            assert record.misfit(own) is None, name
