"""The public names, their signatures, and what they take."""

from __future__ import annotations

import inspect
import subprocess
import sys

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
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, r"workers = 0: out of range \(1 … 4096\)"),
        ({"workers": -3}, r"workers = -3: out of range \(1 … 4096\)"),
        ({"workers": "2"}, "workers = '2': not int"),
        ({"workers": True}, "workers = True: not int"),
        ({"force": "no"}, "force = 'no': not bool"),
        ({"restart": 1}, "restart = 1: not bool"),
        ({"bf16": "no"}, "bf16 = 'no': not bool"),
        ({"max_memory": 1.5}, "max_memory = 1.5: not str or int"),
        ({"activations": 5}, "activations = 5: not str or PathLike or Iterable"),
        ({"activations": ["acts", 5]}, "path = 5: not str or PathLike"),
        ({"output": 5}, "output = 5: not str or PathLike"),
        ({"listen": 5}, "listen = 5: not Callable"),
        ({"nsamples": 0}, r"nsamples = 0: out of range \(1 …\)"),
        ({"seq_len": "x"}, "seq_len = 'x': not int"),
        ({"seq_len": 1}, r"seq_len = 1: out of range \(2 …\)"),
        ({"seed": -1, "nsamples": 1}, r"seed = -1: out of range \(0 …\)"),
    ],
)
@pytest.mark.parametrize("name", ["gptq", "rtn", "awq"])
def test_an_option_of_a_wrong_type_or_out_of_range_is_refused(name, options, said, tmp_path):
    tokens = {"tokens": SAMPLE / "calibration_tokens.npy"} if "activations" not in options else {}
    with pytest.raises(InputError, match=f"^{said}$"):
        getattr(ptq_cli, name)(SAMPLE, **{"output": tmp_path / "out", **tokens, **options})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heldout_every": -1}, r"heldout_every = -1: out of range \(0 …\)"),
        ({"force": "no"}, "force = 'no': not bool"),
        ({"nsamples": 0}, r"nsamples = 0: out of range \(1 …\)"),
        ({"resources": 2}, "resources = 2: not Resources"),
    ],
)
def test_calibrate_refuses_such_too(options, said, tmp_path):
    tokens = SAMPLE / "calibration_tokens.npy"
    with pytest.raises(InputError, match=f"^{said}$"):
        ptq_cli.calibrate(SAMPLE, output=tmp_path / "stats", tokens=tokens, **options)
    assert not [*tmp_path.iterdir()]


def test_evaluate_refuses_such_too():
    with pytest.raises(InputError, match=r"^percentile = 'x': not float$"):
        ptq_cli.evaluate(SAMPLE, SAMPLE, percentile="x")


@pytest.mark.parametrize(
    ("word", "meant"), [("bit", "bits"), ("worker", "workers"), ("token", "tokens")]
)
def test_the_nearest_of_all_names_is_offered(word, meant):
    with pytest.raises(InputError, match=f"did you mean {meant}[?]"):
        ptq_cli.gptq(SAMPLE, **{word: 4})
