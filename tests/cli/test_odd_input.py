"""What looks bad but is not an error: zeros, constants, dead columns, few tokens, other tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from tests.builders import (
    ptq,
    random_inputs,
    random_weight,
    read_model,
    small_activations,
    small_model,
    small_tensors,
    write_model,
)
from tests.refusals import Q


def rounded(weight, *options, command="pack", name="w.weight", **more):
    """Quantize a model of one weight; its dequantized weight and report row."""
    write_model(Path("one.safetensors"), {name: weight, **more})
    outcome = ptq(command, "one.safetensors", *options, "-o", "one", "--json", "--force")
    assert outcome.code == 0, outcome.err
    assert ptq("eval", "one.safetensors", "one").code == 0
    (row,) = outcome.document["layers"]
    return ptq_cli.load_weight("one", row["module"]), row


SYMMETRY = pytest.mark.parametrize("symmetry", ["--sym", "--asym"])


@SYMMETRY
@pytest.mark.parametrize("command", ["pack", "rtn", "gptq"])
def test_all_zero_weights_stay_zero(symmetry, command):
    weight = random_weight(6, 32, dtype=np.float32)
    weight[2] = 0
    weight[:, 8:16] = 0
    result, _ = rounded(weight, symmetry, "-g", 8, command=command)
    assert not result[2].any()
    assert not result[:, 8:16].any()
    assert np.isfinite(result).all()
    result, row = rounded(np.zeros((4, 8), np.float32), symmetry, command=command)
    assert not result.any()
    assert row["rel_err"] == 0


@SYMMETRY
@pytest.mark.parametrize("value", [0.83, -0.83, 1e-4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_weights(symmetry, value, bits):
    weight = np.full((4, 16), value, np.float32)
    result, _ = rounded(weight, symmetry, "-b", bits, "--scale-dtype", "float32")
    scale = abs(value) * 2 / (2**bits - 1)
    assert np.abs(result - weight).max() <= scale / 2 * (1 + 1e-6)


@SYMMETRY
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 5)])
@pytest.mark.parametrize("group", [-1, 0, 1, 3, 128])
def test_small_weights_and_groups_wider_than_they(symmetry, shape, group):
    result, row = rounded(random_weight(*shape), symmetry, "-g", group, "-b", 8)
    assert result.shape == shape
    assert row["group_size"] == group
    assert row["rel_err"] < 1e-3


@SYMMETRY
def test_weights_too_small_for_any_scale_are_refused(symmetry):
    write_model(Path("one.safetensors"), {"w.weight": np.full((2, 4), 1e-40, np.float32)})
    outcome = ptq("pack", "one.safetensors", symmetry, "-o", "one")
    assert outcome.code == 1
    assert "'w.weight' [2, 4]: row 0: a scale of " in outcome.err
    assert " is too small for float32 (at least 1.2e-38)" in outcome.err


@pytest.mark.parametrize("tiny", [1e-45, 1e-9, 6e-8])
@SYMMETRY
def test_tiny_weights_stay_finite(tiny, symmetry):
    weight = np.array([[tiny, -tiny, 0, tiny]] * 2, np.float32)
    result, _ = rounded(weight, symmetry)
    assert np.isfinite(result).all()
    assert np.abs(result).max() <= 1e-6


@pytest.mark.parametrize("dead", ["one", "all but one", "all"])
def test_dead_columns_keep_their_weights(dead, job):
    inputs = random_inputs(96, 32)
    columns = {"one": [3], "all but one": list(range(31)), "all": list(range(32))}[dead]
    inputs[:, columns] = 0
    np.save(f"acts/{Q}.npy", inputs)
    weight = small_tensors()[f"{Q}.weight"].astype(np.float32)
    half_step = np.abs(weight).max() / 255
    arguments = ["gptq", job, "--activations", "acts", "--json", "-b", 8]
    for options in (["--no-mse", "--refine", 0, "--sweeps", 0, "-o", "paper"], ["-o", "out"]):
        outcome = ptq(*arguments, *options)
        assert outcome.code == 0
        row = next(row for row in outcome.document["layers"] if row["module"] == Q)
        assert row["dead_columns"] == len(columns)
        if dead == "all":
            assert (row["method"], row["fallback"]) == ("rtn", "its inputs are all zero")
        said = f"always zero, up to {len(columns)} of 32: layers.0.{{q,k}}_proj"
        assert any(said in line for line in outcome.warnings)
        assert any(said in line for line in outcome.document["warnings"])
    plain = np.abs(ptq_cli.load_weight("paper", Q) - weight)
    assert plain[:, columns].max() <= 1.01 * half_step
    # Ranges and scales serve the columns that live; no weight is deleted all the same.
    assert np.abs(ptq_cli.load_weight("out", Q) - weight).max() < 0.15 * np.abs(weight).max()


def test_a_hessian_that_cannot_be_factored_is_exit_code_4(job):
    """More columns than tokens and no damping: singular, whatever the ladder tries is recorded."""
    small_activations(Path("acts"), 96, **{Q: random_inputs(4, 32)})
    arguments = ["gptq", job, "--activations", "acts", "--damp-percent", "0", "--json"]
    outcome = ptq(*arguments)
    assert outcome.code == 0
    row = next(row for row in outcome.document["layers"] if row["module"] == Q)
    assert row["damp_percent"] > 0
    assert any("damp_percent raised" in note for note in row["notes"])


def test_one_token_and_few_tokens_are_warnings_with_both_numbers(job):
    small_activations(Path("acts"), 20)
    outcome = ptq("calibrate", job, "--activations", "acts")
    assert outcome.code == 0
    assert any("18 tokens" in line and "32 columns" in line for line in outcome.warnings)
    small_activations(Path("acts"), 1)
    outcome = ptq("gptq", job, "--activations", "acts", "-o", "out")
    assert outcome.code == 0
    assert any("on 1 tokens" in line and "32 columns" in line for line in outcome.warnings)


def test_other_tensors_are_copied_and_listed(job):
    extra = {
        "conv.weight": random_weight(4, 3, 2, 2),
        "scalar": np.array(1.5, np.float64),
        "empty.weight": np.zeros((0, 8), np.float32),
        "empty2.weight": np.zeros((8, 0), np.float16),
        "mask": np.array([True, False]),
        "bytes.weight": np.zeros((3, 3), np.uint8),
        "nan.bias": np.array([np.nan], np.float32),
    }
    small_model(job, **extra)
    document = ptq("gptq", job, "--activations", "acts", "--json", "-o", "out").document
    reasons = {entry["tensor"]: entry["reason"] for entry in document["left_alone"]}
    assert reasons["conv.weight"] == "rank 4"
    assert reasons["scalar"] == "rank 0" or "F64" in reasons["scalar"]
    assert reasons["empty.weight"] == reasons["empty2.weight"] == "empty"
    assert reasons["bytes.weight"] == "dtype U8"
    before, after = read_model(job), read_model(Path("out/model.safetensors"))
    for name in extra:
        assert after[name] == before[name]


def test_higher_ranks_are_rounded_where_included(job):
    small_model(job, **{"conv.weight": random_weight(4, 3, 2, 2)})
    arguments = ["gptq", job, "--activations", "acts", "--include", "conv", "--json", "-o", "out"]
    outcome = ptq(*arguments)
    row = next(row for row in outcome.document["layers"] if row["module"] == "conv")
    assert (row["method"], row["shape"]) == ("rtn", [4, 3, 2, 2])
    assert any("conv" in line for line in outcome.warnings)
    assert ptq_cli.load_weight("out", "conv").shape == (4, 3, 2, 2)
    assert ptq("eval", job, "out", "--activations", "acts").code == 0


def test_tied_weights_are_both_rounded_to_the_same(job):
    weight = random_weight(32, 40, seed=5)
    small_model(job, **{"a.weight": weight, "b.weight": weight})
    ptq("pack", job, "-o", "out")
    a, b = (ptq_cli.load_weight("out", name) for name in "ab")
    assert np.array_equal(a, b)
