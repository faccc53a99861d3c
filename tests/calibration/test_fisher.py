"""Diagonal Fisher information: from gradients, stored, merged, ranked, used in the scale search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.core.grid import Grid
from ptq_cli.numerics.statistics import SiteAccumulator
from ptq_cli.registry import method
from tests.builders import LINEARS, ptq, small_job, tree

Q = "layers.0.q_proj"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path) -> Path:
    return small_job(tmp_path)[0]


def gradients(folder, n=5, seed=0, flat=False, dtype=np.float32, **changes):
    rng = np.random.default_rng((seed, n))
    Path(folder).mkdir()
    made = {}
    for module, shape in LINEARS.items():
        values = rng.standard_normal((n, *shape)).astype(dtype)
        made[module] = changes.get(module, values)
        np.save(f"{folder}/{module}.npy", made[module].reshape(n, -1) if flat else made[module])
    return made


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_mean_of_squares_is_stored(model, flat, dtype):
    made = gradients("grads", flat=flat, dtype=dtype)
    assert ptq("calibrate", model, "--activations", "acts", "--gradients", "grads").code == 0
    file = open_calibration(Path("model.calibration.safetensors"))
    assert set(file.fisher) == set(LINEARS)
    for module, values in made.items():
        exact = np.square(values.astype(np.float64)).mean(axis=0)
        np.testing.assert_allclose(file.load_fisher(module), exact, rtol=1e-6)


def test_gradients_alone_make_a_file(model):
    gradients("grads")
    (model.parent / "acts").rename(model.parent / "elsewhere")
    assert ptq("calibrate", model, "--gradients", "grads").code == 0
    file = open_calibration(Path("model.calibration.safetensors"))
    assert set(file.fisher) == set(LINEARS)
    assert file.sites == {}


def test_two_halves_merged_equal_the_whole(model):
    first, second = gradients("a", n=3), gradients("b", n=5, seed=1)
    Path("ab").mkdir()
    for module in LINEARS:
        np.save(f"ab/{module}.npy", np.concatenate([first[module], second[module]]))
    for name in ("a", "b", "ab"):
        made = ptq(
            "calibrate",
            model,
            "--activations",
            "acts",
            "--gradients",
            name,
            "-o",
            name + ".safetensors",
        )
        assert made.code == 0, made.err
    parts = ("--merge", "a.safetensors", "--merge", "b.safetensors")
    assert ptq("calibrate", model, *parts, "-o", "merged.safetensors").code == 0
    merged, whole = (open_calibration(Path(f"{n}.safetensors")) for n in ("merged", "ab"))
    assert merged.fisher == whole.fisher
    for module in LINEARS:
        np.testing.assert_allclose(merged.load_fisher(module), whole.load_fisher(module), rtol=1e-5)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("group_size", [-1, 16, 0])
def test_it_weighs_the_scale_search(name, group_size):
    """Where one column is all that matters, its rounding error falls."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((24, 32))
    importance = np.full(weight.shape, 1e-6)
    importance[:, 7] = 1
    how, grid = method(name), Grid(2, group_size, scale_dtype="float32")
    settings = how.settings()
    if name == "gptq":
        settings = replace(settings, refine=0, sweeps=0, act_order="none")

    def error(weights):
        rounded = how.apply(weight, prepared, grid, settings, weights).weight
        return np.square(rounded.dequantized() - weight)[:, 7].sum()

    statistics = SiteAccumulator(32, heldout_every=0)
    statistics.update(np.eye(32))
    prepared = how.prepare(statistics.result("site", ("site",)), grid, settings)
    assert error(importance) < (0.7 if group_size else 1) * error(None)


@pytest.mark.parametrize("command", ["rtn", "gptq"])
def test_a_run_reads_it(model, command):
    made = gradients("grads")
    made[Q][:, :, :30] = 1e-3
    np.save(f"grads/{Q}.npy", made[Q])
    ptq("calibrate", model, "--activations", "acts", "--gradients", "grads", "--heldout-limit", 0)
    weights = []
    for weight in ("hessian", "fisher"):
        options = {"bits": 2, "group_size": -1, "weight": weight, "force": True, "output": "out"}
        report = getattr(ptq_cli, command)(model, **options)
        assert report.settings["weight"] == weight
        weights.append(ptq_cli.load_weight("out", Q))
    assert command == "rtn" or not np.array_equal(*weights)


def test_inspect_ranks_layers(model):
    made = gradients("grads")
    np.save(f"grads/{Q}.npy", made[Q] * 10)
    ptq("calibrate", model, "--activations", "acts", "--gradients", "grads")
    ranked = ptq("inspect", model, "--json").document["fisher"]
    assert ranked[0]["module"] == Q
    means = [row["mean"] for row in ranked]
    assert means == sorted(means, reverse=True)
    assert sum(row["share"] for row in ranked) == pytest.approx(1)
    assert ranked[0]["samples"] == 5
    assert Q in ptq("inspect", model).out


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((5, 12, 31), ("[5, 12, 31]", "12, 32")),
        ((5, 100), ("[5, 100]", "384")),
        ((12, 32), ("384",)),
    ],
)
def test_gradients_that_fit_no_weight(model, shape, words):
    gradients("grads")
    np.save(f"grads/{Q}.npy", np.ones(shape, np.float32))
    before = tree(Path())
    outcome = ptq("calibrate", model, "--activations", "acts", "--gradients", "grads")
    assert outcome.code == 1
    assert all(word in outcome.err for word in (f"{Q}.npy", *words))
    assert tree(Path()) == before


def test_gradients_of_no_module_and_gradients_that_are_not_numbers(model):
    gradients("grads")
    np.save("grads/layers.0.nothing.npy", np.ones((5, 3), np.float32))
    outcome = ptq("calibrate", model, "--activations", "acts", "--gradients", "grads")
    assert outcome.code == 1
    assert "layers.0.nothing.weight" in outcome.err
    Path("grads/layers.0.nothing.npy").unlink()
    bad = np.ones((5, 12, 32), np.float32)
    bad[3, 2, 1] = np.nan
    np.save(f"grads/{Q}.npy", bad)
    outcome = ptq("calibrate", model, "--activations", "acts", "--gradients", "grads")
    assert outcome.code == 1
    assert "sample 3" in outcome.err


def test_asking_for_it_without_having_it(model):
    outcome = ptq("rtn", model, "--activations", "acts", "--weight", "fisher")
    assert outcome.code == 1
    assert "no Fisher information of 4 layers" in outcome.err


def test_a_folder_without_gradients_is_an_error(model):
    Path("empty").mkdir()
    outcome = ptq("calibrate", model, "--gradients", "empty", "-o", "stats")
    assert outcome.code == 1
    assert "empty: no gradients" in outcome.errors[0]
    assert not Path("stats").exists()
