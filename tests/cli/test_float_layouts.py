"""Layouts of small floats through the command line: written, repacked there and back, damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import ptq
from tests.cli.tiny_folders import llama
from tests.refusals import refused

CT = "compressed-tensors"
DOWN = "model.layers.0.mlp.down_proj"


def write(scheme: str, fmt: str = CT, out: str = "out") -> Path:
    """A tiny Llama, plainly rounded."""
    if not Path("m").exists():
        llama(Path("m"))
    outcome = ptq("rtn", "m", "--no-mse", "--scheme", scheme, "--format", fmt, "-o", out)
    assert outcome.code == 0, outcome.err
    return Path(out)


@pytest.mark.parametrize(("scheme", "first", "others"), [
    ("FP8_DYNAMIC", CT, ("ptq", CT)),
    ("NVFP4A16", CT, ("ptq", CT)),
    ("NVFP4A16", "mlx", (CT, "ptq", "mlx")),
    ("MXFP4A16", CT, ("mlx", "ptq", CT)),
    ("MXFP8", CT, ("ptq", CT)),
])  # fmt: skip
def test_there_and_back(scheme: str, first: str, others: tuple[str, ...]) -> None:
    folder = write(scheme, first)
    before = (folder / "model.safetensors").read_bytes()
    for number, fmt in enumerate(others):
        outcome = ptq("pack", folder, "--format", fmt, "-o", f"{number}")
        assert outcome.code == 0, outcome.err
        folder = Path(f"{number}")
    if others[-1] == first:
        assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("scheme", "fmt", "words"), [
    ("FP8_DYNAMIC", "gptq", ("gptq holds integers, not FP8", f"hint: --format {CT}")),
    ("NVFP4A16", "awq", ("awq holds integers, not FP4", f"hint: --format {CT}")),
    ("FP8_DYNAMIC", "gguf", ("gguf holds integers", "not FP8 numbers", f"hint: --format {CT}")),
    ("MXFP4A16", "gptq", ("gptq holds integers, not FP4", f"hint: --format {CT}")),
    ("MXFP8", "onnx", ("onnx holds integers, not FP8", f"hint: --format {CT}")),
    ("FP8_DYNAMIC", "mlx", ("no FP8 with bfloat16 scales", f"hint: --format {CT}")),
    ("MXFP8", "mlx", ("mlx does not round inputs", f"hint: --format {CT}")),
    ("NVFP4A16", "fp8", ("fp8 holds FP8 numbers", f"hint: --format {CT}")),
    ("FP8_BLOCK", CT, ("128 columns do not divide in_features 64", "--scheme FP8_DYNAMIC")),
])  # fmt: skip
def test_what_a_format_does_not_hold(scheme: str, fmt: str, words: tuple[str, ...]) -> None:
    llama(Path("m"))
    outcome = refused("rtn", "m", "--scheme", scheme, "--format", fmt, "-o", "new")
    for word in words:
        assert word in outcome.err


def flip(folder: Path, tensor: str, place: int, value: int) -> None:
    """One byte of a tensor."""
    stored = open_checkpoint(folder).tensors[tensor]
    data = bytearray(stored.file.read_bytes())
    data[stored.offset + place] = value
    stored.file.write_bytes(data)


@pytest.mark.parametrize(("scheme", "tensor", "value", "said"), [
    ("FP8_DYNAMIC", "weight", 0x7F, "holds NaN (byte 0x7F or 0xFF) at index [0, 5], 1 in all"),
    ("FP8_DYNAMIC", "weight", 0xFF, "holds NaN"),
    ("NVFP4A16", "weight_scale", 0x7F, "holds NaN"),
    ("NVFP4A16", "weight_scale", 0xB0, "holds a scale below zero"),
    ("MXFP4A16", "weight_scale", 0xFF, "holds the exponent 255, NaN"),
])  # fmt: skip
def test_bytes_that_mean_nothing(scheme: str, tensor: str, value: int, said: str) -> None:
    folder = write(scheme)
    flip(folder, f"{DOWN}.{tensor}", 5, value)
    words = (f"{folder}/model.safetensors", f"{DOWN}.{tensor}", said)
    refused("pack", folder, "--format", "ptq", "-o", "new", words=words)
    refused("eval", "m", folder, words=words)


def test_a_global_scale_that_is_another_among_siblings() -> None:
    folder = write("NVFP4A16")
    flip(folder, "model.layers.1.self_attn.v_proj.weight_global_scale", 3, 0x43)
    outcome = refused("pack", folder, "--format", "ptq", "-o", "new")
    assert "v_proj.weight_global_scale" in outcome.err
    assert "runtimes (vLLM) fuse the two under one" in outcome.err


def test_a_block_size_that_does_not_match() -> None:
    folder = write("FP8_DYNAMIC")
    config = json.loads((folder / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights |= {"strategy": "block", "block_structure": [128, 64]}
    (folder / "config.json").write_text(json.dumps(config))
    words = ("weight_scale", "is BF16 [64, 1]", "asks for BF16 [1, 2]")
    refused("pack", folder, "--format", "ptq", "-o", "new", words=words)
