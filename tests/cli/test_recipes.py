"""Every recipe in configs/ runs on sample_data; --scheme; what wins over what."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from ptq_cli.storage.folder import open_quantized
from tests.builders import ROOT, ptq, small_job

RECIPES = sorted((ROOT / "configs").glob("*.toml"))
NAMES = {
    "w4a16-g128", "w4a16-g32-asym", "w3a16-g128", "w8a8-smoothquant", "w8a8-static", "w4a8",
    "awq-w4-g128",
}  # fmt: skip


def test_the_recipes_are_all_there():
    assert {path.stem for path in RECIPES} == NAMES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_the_sample(sample, path):
    recipe = tomllib.loads(path.read_text())
    assert path.read_text().startswith("# ")
    outcome = ptq(recipe["method"], sample, "--config", path, "-o", "out", "--top", 1)
    assert outcome.code == 0, outcome.err
    for layer in open_quantized(Path("out")).layers.values():
        assert layer.grid.bits == recipe["bits"]
        assert layer.grid.group_size == recipe["group_size"]
        assert layer.grid.sym == recipe.get("sym", True)
        assert (layer.activation is not None) == ("activation_scheme" in recipe)


def grid_of(*arguments):
    outcome = ptq(*arguments, "-o", "out", "--force", "--activations", "acts")
    assert outcome.code == 0, outcome.err
    layer = next(iter(open_quantized(Path("out")).layers.values()))
    return layer.grid.bits, layer.grid.group_size, layer.activation is not None


def test_scheme_is_short_for_a_recipe(job):
    assert grid_of("gptq", job, "--scheme", "W4A16") == (4, 128, False)
    assert grid_of("rtn", job, "--scheme", "W8A8") == (8, -1, True)


def test_the_command_line_wins_over_the_recipe_and_that_over_the_default(tmp_path):
    job, _ = small_job(tmp_path)
    Path("r.toml").write_text("bits = 5\ngroup_size = 16\n")
    assert grid_of("rtn", job) == (4, 128, False)
    assert grid_of("rtn", job, "--config", "r.toml") == (5, 16, False)
    assert grid_of("rtn", job, "--config", "r.toml", "--bits", 3) == (3, 16, False)
    assert grid_of("rtn", job, "--config", "r.toml", "--scheme", "W8A8") == (8, -1, True)
    assert grid_of("rtn", job, "--scheme", "W8A8", "--bits", 6) == (6, -1, True)
    Path("r.toml").write_text('scheme = "W8A8"\nbits = 6\n')
    assert grid_of("rtn", job, "--config", "r.toml") == (6, -1, True)


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_an_unknown_key_names_the_nearest(job, method):
    Path("r.toml").write_text("group_sice = 16\n")
    outcome = ptq(method, job, "--config", "r.toml")
    assert outcome.code == 1
    assert "did you mean group_size?" in outcome.err


def test_a_recipe_for_another_command(job):
    outcome = ptq("gptq", job, "--config", ROOT / "configs" / "w8a8-static.toml")
    assert outcome.code == 1
    assert "a recipe for ptq smoothquant" in outcome.err
