"""Weights that are no numbers, too large, or named like others."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.builders import LINEARS, ptq, random_weight, small_model, write_model
from tests.refusals import Q, gptq_refused, refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers(value, dtype, job):
    weight = random_weight(*LINEARS[Q], dtype=dtype)
    weight[3, 5] = weight[4, 0] = value
    small_model(job, **{f"{Q}.weight": weight})
    gptq_refused(job, words=("model.safetensors", f"{Q}.weight", "[12, 32]", "[3, 5]", "2 in all"))


@pytest.mark.parametrize("command", ["gptq", "rtn"])
def test_a_weight_that_is_no_number_is_named_once(command, job):
    weight = random_weight(*LINEARS[Q])
    weight[3, 5] = np.nan
    small_model(job, **{f"{Q}.weight": weight})
    outcome = refused(command, job, "--activations", "acts", words=(f"{Q}.weight",))
    assert outcome.errors[0].count(f"{Q}.weight") == 1
    assert "(without --tokens) leave the tensor out with --ignore" in outcome.err


@pytest.mark.parametrize("group_size", ["128", "-1", "0", "5"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7F800000, 0xFF800000, 0xFFC00001])
def test_plain_rounding_reads_row_by_row_and_sees_them_too(bits, group_size, job):
    """Quiet and signalling NaN of both signs, inf: no warning of NumPy's, one line."""
    weight = random_weight(*LINEARS[Q], dtype=np.float32)
    weight.view(np.uint32)[3, 5] = bits
    small_model(job, **{f"{Q}.weight": weight})
    words = ("model.safetensors", f"{Q}.weight", "[12, 32]", "[3, 5]", "1 in all")
    for more in ([], ["--asym"], ["--scale-dtype", "float32"]):
        refused("rtn", job, "--no-mse", "--group-size", group_size, *more, words=words)


@pytest.mark.parametrize("command", ["gptq", "rtn"])
def test_weights_whose_squares_do_not_fit_float32(command, job):
    weight = random_weight(*LINEARS[Q], dtype=np.float32) * np.float32(1e30)
    small_model(job, **{f"{Q}.weight": weight})
    words = (f"{Q}.weight", "[12, 32]", "too large", "--ignore")
    source = ["--activations", "acts"] if command == "gptq" else ["--no-mse"]
    refused(command, job, *source, "--scale-dtype", "float32", words=words)


def test_weights_beyond_float32(job):
    weight = random_weight(*LINEARS[Q], dtype=np.float64)
    weight[1, 2] = 1e300
    small_model(job, **{f"{Q}.weight": weight})
    gptq_refused(job, words=("model.safetensors", f"{Q}.weight", "[1, 2]", "too large for float32"))


@pytest.mark.parametrize("command", ["gptq", "rtn", "pack"])
@pytest.mark.parametrize("symmetry", ["--sym", "--asym"])
def test_weights_whose_scale_does_not_fit_its_dtype(command, symmetry, job):
    small_model(job, **{f"{Q}.weight": random_weight(12, 32, dtype=np.float32) * np.float32(1e10)})
    source = [] if command == "pack" else ["--activations", "acts"]
    words = (f"{Q}.weight", "[12, 32]", "float16", "--scale-dtype float32")
    refused(command, job, symmetry, *source, words=words)
    assert ptq(command, job, symmetry, *source, "--scale-dtype", "float32").code == 0


def test_a_model_that_says_it_is_quantized(job):
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    Path("m/config.json").write_text('{"quantization_config": {"bits": 4}}')
    refused("gptq", "m", words=("m", "quantization_config"))


def test_a_name_that_packing_would_take_from_another_tensor(job):
    """`w.weight` becomes w.qweight, w.scales and w.zeros; the model's own w.scales is not lost."""
    tensors = {"w.weight": random_weight(4, 8), "w.scales": np.ones(3, np.float32)}
    write_model(Path("own.safetensors"), tensors)
    refused("pack", "own.safetensors", words=("own.safetensors", "w.scales"))


def test_two_tensors_that_would_become_one_module(job):
    tensors = {"w.weight": random_weight(4, 8), "w": random_weight(4, 8)}
    write_model(Path("two.safetensors"), tensors)
    refused("pack", "two.safetensors", "--include", "^w$", words=("'w'",))
