"""Scales that the weights themselves show to be too small or too large for their dtype: a wider one
is taken where the format has it, else the layer stays dense or the run is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.errors import FileError
from ptq_cli.run import loop
from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq, random_inputs, random_weight, tree, write_model
from tests.refusals import refused

Q, K, V, DOWN = (f"layers.0.{name}_proj" for name in ("q", "k", "v", "down"))
FLOAT32: Any = np.float32
HALF_ONLY = ["gptq", "awq", "gptq_v2"]


@pytest.fixture(autouse=True)
def _here(here):
    """Every test in a folder of its own."""


def model(part: Any = slice(None), factor: float = 1e-7, dtype: Any = FLOAT32) -> Path:
    """q, k and v of [32, 64], down of [64, 32]; a part of q is multiplied by `factor`."""
    tensors = {
        f"{name}.weight": random_weight(32, 64, seed=seed, dtype=FLOAT32)
        for seed, name in enumerate((Q, K, V))
    }
    tensors[f"{DOWN}.weight"] = random_weight(64, 32, seed=7, dtype=FLOAT32)
    tensors[f"{Q}.weight"][part] *= factor
    tensors = {name: values.astype(dtype) for name, values in tensors.items()}
    return write_model(Path("m.safetensors"), tensors)


def weight(path: Path) -> np.ndarray:
    from ptq_cli.storage.checkpoint import open_checkpoint

    return open_checkpoint(path).read(f"{Q}.weight").astype(np.float64)


def worst_group(path: Path) -> float:
    """The greatest relative error of a group of 32 columns of q."""
    true = weight(path).reshape(32, 2, 32)
    error = open_quantized(Path("out")).load(Q).dequantized().reshape(32, 2, 32) - true
    energy = (true**2).sum(-1)
    return float(((error**2).sum(-1)[energy > 0] / energy[energy > 0]).max())


def scale_dtypes() -> dict[str, str]:
    layers = open_quantized(Path("out")).layers
    return {module: layer.grid.scale_dtype for module, layer in layers.items()}


PARTS = {"a tensor": slice(None), "a row": 3, "a group": (3, slice(32, 64))}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("factor", [1e-7, 1e-12])
@pytest.mark.parametrize("dtype", [FLOAT32, ml_dtypes.bfloat16])
def test_the_next_wider_dtype_is_taken(part, factor, dtype):
    path = model(PARTS[part], factor, dtype)
    outcome = ptq("pack", path, "-g", 32, "-o", "out")
    assert outcome.code == 0, outcome.err
    assert worst_group(path) < 0.05
    assert scale_dtypes() == {
        Q: "bfloat16", K: "bfloat16", V: "bfloat16", DOWN: "float16"
    }  # fmt: skip
    (warning,) = outcome.warnings
    assert "layers.0.{q,k,v}_proj" in warning
    assert "bfloat16" in warning
    assert ptq("eval", path, "out").code == 0


@pytest.mark.parametrize("form", ["compressed-tensors", "mlx"])
@pytest.mark.parametrize("sym", ["--sym", "--asym"])
def test_scales_of_the_models_dtype_reach_as_far(form, sym):
    path = model(3, dtype=ml_dtypes.bfloat16)
    assert ptq("pack", path, "-g", 32, sym, "--format", form, "-o", "out").code == 0
    assert worst_group(path) < 0.05
    assert set(scale_dtypes().values()) == {"bfloat16"}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_methods_take_it_too(method):
    path = model(3)
    Path("acts").mkdir()
    for module, width in ((Q, 64), (DOWN, 32)):
        np.save(f"acts/{module}.npy", random_inputs(96, width))
    workers = 2 if method == "gptq" else 1  # errors cross the border of a process
    options = ["-g", 32, "--activations", "acts", "--workers", workers, "-o", "out"]
    assert ptq(method, path, *options).code == 0
    assert worst_group(path) < 0.1
    assert scale_dtypes()[Q] == "bfloat16"


@pytest.mark.parametrize("form", HALF_ONLY)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("factor", [1e-7, 1e8])
def test_where_there_is_none_it_is_an_error(form, part, factor):
    path = model(PARTS[part], factor)
    words = (f"tensor '{Q}.weight' [32, 64]", "float16", "--on-misfit keep", "--format ptq")
    refused("pack", path, "-g", 32, "--format", form, "-o", "out", words=words)


def test_the_error_has_the_row_and_the_scale_that_it_needs():
    path = model(3)
    outcome = refused("pack", path, "-g", 32, "--format", "gptq", "-o", "out", words=("row 3: ",))
    needed = np.abs(weight(path)[3].reshape(2, 32)).max(-1)[0] / 7.5
    assert f"a scale of {needed:.2g} is too small for float16 (at least 4.8e-07)" in outcome.err


@pytest.mark.parametrize("form", HALF_ONLY)
def test_such_layers_may_stay_dense_with_those_beside_them(form):
    path = model(3)
    options = ["-g", 32, "--format", form, "--on-misfit", "keep", "-o", "out"]
    assert ptq("pack", path, *options).code == 0
    assert set(scale_dtypes()) == {DOWN}
    kept = json.loads(Path("out/report.json").read_text())["left_alone"]
    assert [entry["tensor"] for entry in kept] == [f"{name}.weight" for name in (Q, K, V)]


def test_a_dtype_that_was_asked_for_stays():
    path = model(3)
    options = ["pack", path, "-g", 32, "-o", "out", "--scale-dtype"]
    refused(*options, "float16", words=("row 3", "--scale-dtype float32"))
    assert ptq(*options, "bfloat16").code == 0


@pytest.mark.parametrize("factor", [1e-37, 1e-41])
def test_float32_ends_too(factor):
    """Its denormals are no scales: many runtimes flush them to zero."""
    words = ("row 3", "too small for float32", "--on-misfit keep")
    refused("pack", model(3, factor), "-g", 32, "-o", "out", words=words)


@pytest.mark.parametrize("form", ["ptq", "gptq", "compressed-tensors", "mlx"])
@pytest.mark.parametrize("part", PARTS)
def test_zeros_are_fine(form, part):
    path = model(PARTS[part], 0.0)
    assert ptq("pack", path, "-g", 32, "--format", form, "-o", "out").code == 0
    assert not open_quantized(Path("out")).load(Q).dequantized()[PARTS[part]].any()


def test_what_was_found_outlives_an_interruption(monkeypatch):
    """The second half of a run is killed; the same command ends with the same bytes."""
    path = model(3)
    command = ["pack", path, "-g", 32, "-o", "out"]
    assert ptq(*command).code == 0
    expected = tree(Path("out"))
    shutil.rmtree("out")

    def full(*_: object) -> None:
        raise FileError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_output", full)
        assert ptq(*command).code == 1
    assert Path("out.partial").exists()
    assert ptq(*command).code == 0
    assert tree(Path("out")) == expected


@pytest.mark.parametrize("form", ["ptq", "onnx"])
def test_scales_too_large_are_an_error_with_a_dtype_that_works(form):
    pytest.importorskip("onnx")
    options = ["pack", model(3, 1e8), "-g", 32, "--format", form, "-o", "out", "--scale-dtype"]
    refused(*options, "float16", words=("at most 6.55e+04", "--scale-dtype float32"))
    assert ptq(*options, "float32").code == 0


def test_an_offset_too_large_is_an_error_with_a_dtype_that_works():
    """mlx stores −zero · scale in the dtype of the scales."""
    path = model(factor=1.0, dtype=np.float16)
    tensors = {f"{DOWN}.weight": np.full((64, 32), 60000, np.float16)}
    tensors[f"{DOWN}.weight"][:, 0] = -65504
    write_model(path, tensors)
    options = ["-g", 32, "-b", 2, "--asym", "--format", "mlx", "-o", "out"]
    refused("pack", path, *options, words=("an offset", "--sym, or --scale-dtype float32"))
    assert ptq("pack", path, *options, "--scale-dtype", "float32").code == 0
