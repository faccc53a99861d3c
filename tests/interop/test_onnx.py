"""model.onnx in ONNX Runtime: every linear's outputs are those of the dequantized weight."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.commands import api
from ptq_cli.storage.quantized import open_quantized
from tests.interop.test_runtimes import mirrored_share

# Marks, not a skip of the module: tests/docs/test_docs.py reads CASES where this is not installed.
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs the extra interop"),
]

SAMPLE = Path(__file__).parent.parent.parent / "sample_data"
CASES: list[tuple[int, int, bool, dict[str, Any]]] = [
    (2, 32, True, {}), (2, 16, False, {}), (4, 128, True, {}), (4, 32, False, {}),
    (8, 256, True, {}), (8, 64, False, {}), (4, 128, True, {"scale_dtype": "float16"}),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group", "sym", "extra"), CASES)
def test_linears(tmp_path: Path, bits: int, group: int, sym: bool, extra: dict[str, Any]) -> None:
    import onnxruntime

    out = tmp_path / "out"
    api.rtn(SAMPLE, bits=bits, group_size=group, sym=sym, format="onnx", output=out, **extra)
    folder = open_quantized(out)
    assert not sym or mirrored_share(out) > 0.25
    session = onnxruntime.InferenceSession(out / "model.onnx")
    dtype = np.float16 if extra else np.float32
    rng = np.random.default_rng(0)
    feeds = {
        module: rng.standard_normal((3, layer.shape[1])).astype(dtype)
        for module, layer in folder.layers.items()
    }
    outputs = session.run([f"{module}.outputs" for module in feeds], feeds)
    for (module, inputs), found in zip(feeds.items(), outputs, strict=True):
        expected = inputs.astype(np.float32) @ folder.load(module).dequantized().T
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < (2e-3 if extra else 1e-6), module


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("level", [1, 4])
def test_negative_scales_at_other_accuracy_levels(tmp_path: Path, bits: int, level: int) -> None:
    """A node that somebody builds from ours with inputs in 8 bits (4), or in float32 (1)."""
    import onnx
    import onnxruntime

    out = tmp_path / "out"
    api.rtn(SAMPLE, bits=bits, group_size=32, format="onnx", output=out)
    folder = open_quantized(out)
    assert mirrored_share(out) > 0.25
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    onnx.save(graph, out / "other.onnx")
    session = onnxruntime.InferenceSession(out / "other.onnx")
    rng = np.random.default_rng(0)
    for module, layer in folder.layers.items():
        inputs = rng.standard_normal((3, layer.shape[1])).astype(np.float32)
        feeds = {one: np.zeros((1, x.shape[1]), np.float32) for one, x in folder.layers.items()}
        (found,) = session.run([f"{module}.outputs"], {**feeds, module: inputs})
        expected = inputs @ folder.load(module).dequantized().T
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < (2e-2 if level == 4 else 1e-6), module


def test_biases_and_short_blocks(tmp_path: Path) -> None:
    import ml_dtypes
    import onnxruntime
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    bias = rng.standard_normal(12).astype(ml_dtypes.bfloat16)
    weight = rng.standard_normal((12, 200)).astype(np.float32)
    save_file({"a.weight": weight, "a.bias": bias}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    api.rtn(tmp_path / "model.safetensors", group_size=32, sym=False, format="onnx", output=out)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    inputs = rng.standard_normal((5, 200)).astype(np.float32)
    (found,) = session.run(None, {"a": inputs})
    expected = inputs @ open_quantized(out).load("a").dequantized().T + bias.astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
