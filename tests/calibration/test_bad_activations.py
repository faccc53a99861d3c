"""Activations that do not fit the model, or are no numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq, random_inputs, random_weight, write_model
from tests.refusals import DOWN, Q, gptq_refused, refused

pytestmark = pytest.mark.usefixtures("here")


def test_both_widths_are_named(job):
    np.save(f"acts/{Q}.npy", random_inputs(50, 31))
    words = (f"{Q}.npy", "[50, 31]", "31", f"{Q}.weight", "[12, 32]", "32")
    refused("calibrate", job, "--activations", "acts", words=words)
    gptq_refused(job, words=words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 7, 50, 95])  # 7 and 95 are held out
def test_activations_that_are_no_numbers(value, token, job):
    inputs = random_inputs(96, 32)
    inputs[token, 9] = value
    np.save(f"acts/{Q}.npy", inputs)
    words = (f"{Q}.npy", "[96, 32]", f"token {token}", "channel 9")
    refused("calibrate", job, "--activations", "acts", words=words)
    gptq_refused(job, words=words)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_place_in_shards_is_a_place_in_its_file(job, order):
    inputs = random_inputs(96, 32).reshape(3, 32, 32)
    inputs[2, 1, 4] = np.nan
    Path(f"acts/{Q}.npy").unlink()
    Path(f"acts/{Q}").mkdir()
    for i in range(3):
        np.save(f"acts/{Q}/{i}.npy", np.array(inputs[i], order=order))
    words = ("2.npy", "[32, 32]", "token 1", "channel 4")
    refused("calibrate", job, "--activations", "acts", words=words)


@pytest.mark.parametrize("big", [1e300, -1e39])
def test_activations_beyond_float32(job, big):
    inputs = random_inputs(96, 32, dtype=np.float64)
    inputs[4, 2] = big
    np.save(f"acts/{Q}.npy", inputs)
    refused("calibrate", job, "--activations", "acts", words=(f"{Q}.npy", "token 4", "channel 2"))


@pytest.mark.parametrize("big", [1e25, 3e38])
def test_activations_whose_squares_overflow(job, big):
    inputs = random_inputs(96, 32, dtype=np.float32)
    inputs[:] = big
    np.save(f"acts/{Q}.npy", inputs)
    refused("calibrate", job, "--activations", "acts", words=(Q, "overflow"))


def test_missing_and_surplus_activations_are_both_listed(job):
    Path(f"acts/{DOWN}.npy").rename("acts/layers.0.down_prj.npy")
    words = (DOWN, "layers.0.down_prj", "acts")
    refused("calibrate", job, "--activations", "acts", words=words)
    gptq_refused(job, words=words)


def test_shards_of_different_widths(job):
    Path(f"acts/{Q}.npy").unlink()
    Path(f"acts/{Q}").mkdir()
    for i, width in enumerate((32, 31)):
        np.save(f"acts/{Q}/{i}.npy", random_inputs(10, width))
    refused("calibrate", job, "--activations", "acts", words=("0.npy", "32", "1.npy", "31"))


@pytest.mark.parametrize("every", [1, 2])
def test_holding_everything_out_leaves_no_tokens(job, every):
    inputs = random_inputs(96, 32)[: 1 if every == 1 else 2]
    np.save(f"acts/{Q}.npy", inputs)
    outcome = ptq("calibrate", job, "--activations", "acts", "--heldout-every", every)
    assert outcome.code == (1 if every == 1 else 0)
    if every == 1:
        assert "no tokens" in outcome.errors[0]
        assert not Path("model.calibration.safetensors").exists()


def test_activations_that_are_nowhere(job):
    refused("gptq", job, "--activations", "nowhere", words=("nowhere", "No such file"))
    refused("calibrate", job, words=("model.safetensors", "--activations DIR"))


def test_a_calibration_and_activations_exclude_each_other(job):
    ptq("calibrate", job, "--activations", "acts")
    stats = "model.calibration.safetensors"
    arguments = ["gptq", job, "--calibration", stats, "--activations", "acts"]
    refused(*arguments, words=(stats, "acts"))


def test_activations_are_found_by_exact_names_only(job):
    """A module that is called like a path opens no file but one of that very name."""
    np.save("secret.npy", random_inputs(10, 8))
    Path("empty").mkdir()
    write_model(Path("m.safetensors"), {"../secret.weight": random_weight(4, 8)})
    refused("gptq", "m.safetensors", "--activations", "empty", words=("../secret",))
