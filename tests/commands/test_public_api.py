"""The public names, their signatures, and what they take."""

from __future__ import annotations

import inspect
import subprocess
import sys
from itertools import accumulate

import numpy as np
import pytest

import ptq_cli
from ptq_cli.errors import InputError
from tests.builders import ROOT
from tests.commands.make_stub import QUANTIZING, TARGET, stub

SAMPLE = ROOT / "sample_data"


def test_dir_shows_the_public_names_only():
    script = "import ptq_cli, ptq_cli.errors, ptq_cli.core.grid; print(*dir(ptq_cli))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.split() == sorted(ptq_cli.__all__)


def test_the_stub_is_fresh():
    assert TARGET.read_text("utf-8") == stub(), "python -m tests.commands.make_stub"


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "ptq_cli" / "py.typed").exists()


@pytest.mark.parametrize("name", QUANTIZING)
def test_signatures_are_those_of_the_settings(name):
    parameters = inspect.signature(getattr(ptq_cli, name)).parameters
    assert next(iter(parameters)) == "model"
    assert parameters["bits"].annotation is int
    assert parameters["bits"].default == (8 if name == "smoothquant" else 4)
    assert ("activations" in parameters) == (name != "pack")
    assert ("act_order" in parameters) == (name in ("gptq", "awq", "smoothquant"))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_one_path_is_as_good_as_several(tmp_path):
    """A string was once iterated over, character by character."""
    model, folder = SAMPLE / "model.safetensors", SAMPLE / "activations"
    fast = {"bits": 3, "refine": 0, "sweeps": 0, "mse": False}
    ptq_cli.gptq(str(model), activations=str(folder), output=tmp_path / "a", **fast)
    ptq_cli.gptq(model, activations=[folder], output=tmp_path / "b", **fast)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_one_pattern_is_as_good_as_several(tmp_path):
    report = ptq_cli.rtn(SAMPLE, ignore="mlp", output=tmp_path / "out")
    assert report.rows
    assert not any("mlp" in row.module for row in report.rows)


def test_calibrate_and_evaluate_take_tokens_as_gptq_does(tmp_path):
    tokens = SAMPLE / "calibration_tokens.npy"
    statistics = tmp_path / "stats.safetensors"
    made = ptq_cli.calibrate(SAMPLE, output=statistics, tokens=tokens, nsamples=2, seq_len=32)
    assert {entry["n_seen"] for entry in made["sites"].values()} == {64}
    np.save(tmp_path / "tokens.npy", np.load(tokens)[:2, :32])
    ptq_cli.rtn(SAMPLE, output=tmp_path / "out")
    report = ptq_cli.evaluate(SAMPLE, tmp_path / "out", tokens=str(tmp_path / "tokens.npy"))
    assert report.quality is not None
    assert report.quality["sequences"] == 2


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(InputError, match="unknown settings bitz"):
        ptq_cli.gptq(SAMPLE, bitz=4, output=tmp_path / "out")
    with pytest.raises(InputError, match="unknown settings fallback"):
        ptq_cli.smoothquant(SAMPLE, fallback="rtn", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whoever_listens_hears_how_many_weights_are_done(tmp_path):
    """After each layer those of all layers so far, in the end of all."""
    steps = []
    report = ptq_cli.rtn(SAMPLE, output=tmp_path / "out", listen=steps.append)
    rounded = [step for step in steps if step.phase == "quantize"]
    sizes = {row.module: row.shape[0] * row.shape[1] for row in report.rows}
    assert [step.work for step in rounded] == list(accumulate(sizes[s.name] for s in rounded))
    assert {step.all_work for step in rounded} == {sum(sizes.values())}
    assert rounded[-1].work == rounded[-1].all_work
