"""The public names, their signatures, and what they take."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from itertools import accumulate

import click
import numpy as np
import pytest

import ptq_cli
from ptq_cli.cli import shared_options as shared
from ptq_cli.cli.main import cli
from ptq_cli.errors import InputError
from tests.builders import ROOT, half_sample
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


# What the command line has of its own: recipes as files, what is printed, gates, dry runs. The
# functions give back a report instead.
WORDS = {"config", "quiet", "strict", "as_json", "report_path", "html", "junit", "top", "dry_run"}


@pytest.mark.parametrize("name", ["allocate", *QUANTIZING])
def test_whatever_the_command_line_takes_python_does(name):
    parameters = inspect.signature(getattr(ptq_cli, name)).parameters
    command = cli.get_command(click.Context(cli), name)
    gates = {param.name for param in (*shared.GATE_OPTIONS, shared.ALLOW_WEAK)}
    options = {param.name for param in command.params if not param.name.startswith("help")}
    assert options - gates - WORDS <= parameters.keys()


BUDGET = {"tokens": SAMPLE / "calibration_tokens.npy", "nsamples": 2, "seq_len": 32, "fast": True}


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    return half_sample(tmp_path_factory.mktemp("block") / "sample_data", blocks=1)


def test_a_budget_becomes_a_recipe_and_the_same_model(one_block, tmp_path):
    own = {**BUDGET, "target_bpw": 4, "group_size": 64, "choices": "W3A16,W4A16,W6A16"}
    own["table"] = tmp_path / "table.json"
    recipe = tmp_path / "r.toml"
    said = ptq_cli.allocate(one_block, method="rtn", output=str(recipe), **own)
    assert said["output"] == str(recipe)
    assert said["bits_per_weight"] <= 4
    assert set(said["groups"].values()) <= {"W3A16", "W4A16", "W6A16"}
    assert said["uniform"].keys() == {"W3A16", "W4A16", "W6A16"}
    assert len(said["notes"]) >= 1
    own["choices"] = ["W3A16", "W4A16", "W6A16"]
    report = ptq_cli.rtn(one_block, output=tmp_path / "a", **own)
    assert report.settings["allocation"]["predicted_kl"] == said["predicted_kl"]
    assert report.totals["bits_per_weight"] == pytest.approx(said["bits_per_weight"], rel=1e-3)
    tokens = {name: BUDGET[name] for name in ("tokens", "nsamples", "seq_len")}
    layers = tomllib.loads(recipe.read_text())["layers"]
    ptq_cli.rtn(one_block, output=tmp_path / "b", group_size=64, layers=layers, **tokens)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "target_bpw or target_size says how much"),
        ({"target_bpw": 4, "target_size": "1MB"}, "exclude each other"),
        ({"target_bpw": 4, "method": "pack"}, "method 'pack'"),
        ({"target_bpw": 4, "method": "rtn", "act_order": "desc"}, "--act-order does nothing here"),
        ({"target_bpw": 4, "bits": 4}, "unknown settings bits"),
        ({"keep": "lm_head=W6A16"}, "--keep does nothing without"),
    ],
)
def test_a_budget_that_is_none(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        ptq_cli.allocate(SAMPLE, output=tmp_path / "r.toml", **options)
    assert not [*tmp_path.iterdir()]


def test_another_recipe_is_not_overwritten(one_block, tmp_path):
    own = {**BUDGET, "method": "rtn", "output": tmp_path / "r.toml", "table": tmp_path / "t.json"}
    ptq_cli.allocate(one_block, target_bpw=4.5, **own)
    before = (tmp_path / "r.toml").read_text()
    ptq_cli.allocate(one_block, target_bpw=4.5, **own)
    with pytest.raises(InputError, match="exists already"):
        ptq_cli.allocate(one_block, target_bpw=5, **own)
    assert (tmp_path / "r.toml").read_text() == before
    ptq_cli.allocate(one_block, target_bpw=5, force=True, **own)
    assert (tmp_path / "r.toml").read_text() != before


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
