"""Every recipe in configs/ runs on sample_data; --scheme; what wins over what."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from ptq_cli.plan.mixes import is_mix
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.storage.quantized import open_quantized
from tests.builders import ROOT, ptq, read_model, small_job

RECIPES = sorted((ROOT / "configs").glob("*.toml"))
NAMES = {
    "w4a16-g128", "w4a16-g32-asym", "w3a16-g128", "w8a8-smoothquant", "w8a8-static", "w4a8",
    "awq-w4-g128", "fp8-dynamic", "fp8-static", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4",
    "mxfp4a16", "mxfp8", "mxfp8a16", "w4afp8", "nvfp4-experts-fp8-attention",
    "gguf-q4_k_m",
}  # fmt: skip


def test_the_recipes_are_all_there():
    assert {path.stem for path in RECIPES} == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_the_sample(sample, path):
    recipe = tomllib.loads(path.read_text())
    assert path.read_text().startswith("# ")
    outcome = ptq(recipe["method"], sample, "--config", path, "-o", "out", "--top", 1)
    assert outcome.code == 0, outcome.err
    if is_mix(recipe.get("scheme", "")):
        kinds = {row["module"]: row["type"] for row in outcome_rows()}
        assert {kinds["lm_head"], kinds["model.layers.0.mlp.up_proj"]} == {"Q8_0"}
        assert kinds["model.layers.1.mlp.up_proj"] == "Q5_0"  # rows of 128: Q4_K falls back
        return
    for layer in open_quantized(Path("out")).layers.values():
        rules = [rule for rule in recipe.get("layers", ()) if rule["match"] in layer.module]
        scheme = SCHEMES.get([recipe, *rules][-1].get("scheme"))
        if scheme is not None:
            assert layer.activation == scheme.inputs
            assert layer.grid.levels == scheme.grid.get("levels", "integer")
        own = recipe if scheme is None else scheme.settings
        assert layer.grid.bits == own["bits"]
        assert layer.grid.group_size == own["group_size"]
        assert layer.grid.sym == own.get("sym", True)
        if scheme is None:
            assert (layer.activation is not None) == ("activation_scheme" in recipe)


def outcome_rows() -> list[dict]:
    return json.loads(Path("out/report.json").read_text())["layers"]


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


# ---- [[layers]] ----


def run_with(rules: str, *arguments: object):
    Path("r.toml").write_text(rules)
    return ptq(*arguments, "--config", "r.toml", "-o", "out", "--force", "--activations", "acts")


def grids(folder="out"):
    return {m: layer.grid for m, layer in open_quantized(Path(folder)).layers.items()}


def test_layers_have_settings_of_their_own_and_the_last_rule_wins(job):
    rules = """
        [[layers]]
        match = "_proj"
        bits = 8
        [[layers]]
        match = 'down_proj'
        bits = 3
        group_size = 8
        sym = false
    """
    assert run_with(rules, "gptq", job).code == 0
    found = grids()
    assert {m: g.bits for m, g in found.items() if "down" not in m} == {
        "layers.0.q_proj": 8, "layers.0.k_proj": 8, "layers.0.o_proj": 8,
    }  # fmt: skip
    down = found["layers.0.down_proj"]
    assert (down.bits, down.group_size, down.sym) == (3, 8, False)


@pytest.mark.parametrize("command", ["gptq", "rtn", "awq"])
def test_sixteen_bits_leave_a_layer_dense(job, command):
    rules = '[[layers]]\nmatch = "."\nbits = 16\n[[layers]]\nmatch = "down_proj"\nbits = 8\n'
    if command == "awq":
        rules += '[[sites]]\nlinears = ["layers.0.down_proj"]\n'
    outcome = run_with(rules, command, job, "--json")
    assert outcome.code == 0, outcome.err
    assert {m: g.bits for m, g in grids().items()} == {"layers.0.down_proj": 8}
    reasons = {row["tensor"]: row["reason"] for row in outcome.document["left_alone"]}
    assert reasons["layers.0.q_proj.weight"] == "bits = 16"
    assert reasons["embed_tokens.weight"] == "embedding"
    before, after = (read_model(path) for path in (job, Path("out/model.safetensors")))
    assert after["layers.0.q_proj.weight"] == before["layers.0.q_proj.weight"]


@pytest.mark.parametrize("bits", [1, 9, 15, 17])
def test_other_widths_of_a_layer_are_refused(job, bits):
    outcome = run_with(f'[[layers]]\nmatch = "q_proj"\nbits = {bits}\n', "rtn", job)
    assert (outcome.code, f"bits = {bits}" in outcome.err) == (1, True)


def test_all_layers_at_sixteen_bits_is_for_smoothquant_alone(one_block):
    Path("r.toml").write_text("bits = 16\n")
    for command in ("gptq", "rtn", "awq"):
        outcome = ptq(command, one_block, "--config", "r.toml", "-o", "out")
        assert (outcome.code, "nothing to do" in outcome.err) == (1, True), outcome.err
    outcome = ptq("smoothquant", one_block, "--config", "r.toml", "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["settings"]["bits"] == 16
    assert {entry[0] for entry in read_model(Path("out/model.safetensors")).values()} == {"BF16"}


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors", "awq"])
@pytest.mark.parametrize("rule", ["bits = 16", "skip = true"])
def test_a_sibling_left_dense_is_refused_where_runtimes_fuse_the_two(sample, name, rule):
    sym = "false" if name == "awq" else "true"
    rules = f'sym = {sym}\n[[layers]]\nmatch = "1.self_attn.v_proj"\n{rule}\n'
    Path("r.toml").write_text(rules)
    outcome = ptq("rtn", sample, "--config", "r.toml", "--format", name, "-o", "out")
    assert outcome.code == 1
    for word in ("layers.1.self_attn.k_proj has 4 bits", "v_proj is left dense", "fuse"):
        assert word in outcome.err


@pytest.mark.parametrize("name", ["ptq", "mlx", "gguf"])
def test_siblings_may_differ_where_nothing_fuses_them(one_block, name):
    rules = 'group_size = 32\nsym = false\n[[layers]]\nmatch = "v_proj"\nbits = 16\n'
    Path("r.toml").write_text(rules)
    outcome = ptq("rtn", one_block, "--config", "r.toml", "--format", name, "-o", "out")
    assert outcome.code == 0, outcome.err


def test_siblings_with_other_groups_are_each_rounded_by_their_own(one_block):
    """A site's columns are ordered by groups: with those of the first layer the others' scales had
    been nonsense, and plain rounding was kept."""
    Path("r.toml").write_text('[[layers]]\nmatch = "(k|v)_proj"\ngroup_size = 32\n')
    assert ptq("gptq", one_block, "--config", "r.toml", "-o", "mixed").code == 0
    for size in (32, 128):
        assert ptq("gptq", one_block, "--group-size", size, "-o", f"all{size}").code == 0
    mixed, narrow, wide = (
        read_model(Path(folder) / "model.safetensors") for folder in ("mixed", "all32", "all128")
    )
    for name, entry in mixed.items():
        own = narrow if "k_proj" in name or "v_proj" in name else wide
        assert entry == own[name], name
