"""The commands as functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from tests.builders import ptq, read_model, tree

pytestmark = pytest.mark.usefixtures("here")


def test_the_public_names_are_these():
    assert ptq_cli.__all__ == sorted(ptq_cli.__all__)
    assert set(ptq_cli.__all__) >= {
        *("PtqError", "QuantizedLinear", "__version__", "calibrate", "evaluate"),
        *("gptq", "rtn", "pack", "load_linear", "load_weight"),
    }
    for name in ptq_cli.__all__:
        assert getattr(ptq_cli, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = ptq_cli.nothing_like_it


def test_functions_write_what_commands_write(job):
    assert ptq("calibrate", job, "--activations", "acts", "-o", "a.safetensors").code == 0
    result = ptq_cli.calibrate(job, ["acts"], "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert set(result["sites"]) == {f"layers.0.{n}_proj" for n in ("q", "o", "down")}
    for verb in (ptq_cli.gptq, ptq_cli.rtn, ptq_cli.pack):
        name = verb.__name__
        source = [] if name == "pack" else ["--calibration", "a.safetensors"]
        own = {} if name == "pack" else {"calibration": "a.safetensors"}
        assert ptq(name, job, "-b", 3, "-g", 8, *source, "-o", f"{name}-c").code == 0
        report = verb(job, bits=3, group_size=8, **own, output=f"{name}-f")
        assert tree(Path(f"{name}-c")) == tree(Path(f"{name}-f"))
        assert report.totals["layers"] == 4
    report = ptq_cli.evaluate(job, "gptq-f", calibration="a.safetensors")
    assert report.totals["gain_vs_rtn"] > 1


def test_functions_raise_the_projects_own_errors(job):
    with pytest.raises(ptq_cli.PtqError, match="out of range"):
        ptq_cli.gptq(job, bits=9)
    with pytest.raises(ptq_cli.PtqError, match="unknown settings bit"):
        ptq_cli.gptq(job, bit=4)
    with pytest.raises(ptq_cli.PtqError, match="nowhere"):
        ptq_cli.load_weight("nowhere", "layers.0.q_proj")


def test_a_quantized_linear_computes(job):
    ptq_cli.gptq(job, activations=["acts"], bits=8, group_size=16, output="out")
    linear = ptq_cli.load_linear("out", "layers.0.q_proj")
    assert isinstance(linear, ptq_cli.QuantizedLinear)
    inputs = np.load("acts/layers.0.q_proj.npy")[:12].reshape(3, 4, 32)
    tensors = read_model(job)
    bf16 = np.frombuffer(tensors["layers.0.q_proj.weight"][2], np.uint16).astype(np.uint32) << 16
    bias = np.frombuffer(tensors["layers.0.q_proj.bias"][2], np.float32)
    exact = inputs.astype(np.float32) @ bf16.view(np.float32).reshape(12, 32).T + bias
    outputs = linear(inputs)
    assert outputs.shape == (3, 4, 12)
    np.testing.assert_allclose(outputs, exact, atol=0.02 * np.abs(exact).max())
    with pytest.raises(ptq_cli.PtqError, match="32"):
        linear(inputs[..., :5])
