"""ptq inspect: tensors, sites, outlier channels, importance; of float and quantized models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import half_sample, ptq, write_model
from tests.cli.tiny_folders import llama, llava, mixtral
from tests.methods.rescaled import rescaled_sample

SITE = "model.layers.0.self_attn.q_proj"


def test_tensors_and_sites_of_a_float_model(sample):
    document = ptq("inspect", sample, "--json").document
    assert document["family"] == "llama"
    assert document["totals"]["dtypes"] == {"BF16": 21}
    tensors = {entry["tensor"]: entry for entry in document["tensors"]}
    assert tensors["model.norm.weight"]["left_alone"] is not None
    assert tensors[f"{SITE}.weight"] == {
        "tensor": f"{SITE}.weight", "dtype": "BF16", "shape": [128, 128], "bytes": 32768,
        "left_alone": None,
    }  # fmt: skip
    first = document["sites"][0]
    assert first["fed_by"] == "model.layers.0.input_layernorm.weight"
    assert [name.rpartition(".")[2] for name in first["linears"]] == ["q_proj", "k_proj", "v_proj"]


def test_importance_is_the_largest_input_times_the_mean_weight(sample):
    site = ptq("inspect", sample, "--json").document["sites"][0]
    inputs = np.load(sample / "activations" / f"{SITE}.npy").astype(np.float64)
    seen = np.delete(inputs, np.arange(7, len(inputs), 8), axis=0)
    checkpoint = open_checkpoint(sample)
    rows = [checkpoint.read(f"{name}.weight").astype(np.float64) for name in site["linears"]]
    importance = np.abs(seen).max(axis=0) * np.abs(np.concatenate(rows)).mean(axis=0)
    top = np.argsort(-importance)[:5]
    assert [entry["channel"] for entry in site["importance"]] == top.tolist()
    found = [entry["importance"] for entry in site["importance"]]
    np.testing.assert_allclose(found, importance[top], rtol=1e-5)


def test_loud_channels_are_listed(tmp_path):
    loud = rescaled_sample(tmp_path / "loud", copy=half_sample)
    sites = ptq("inspect", loud, "--json").document["sites"]
    counts = [len(site["loud_channels"]) for site in sites]
    assert counts == [1, 0, 1, 0] * 2
    assert "outliers" in ptq("inspect", loud).out


@pytest.mark.parametrize("command", ["rtn", "smoothquant"])
def test_a_quantized_folder(sample, command):
    assert ptq(command, sample, "--bits", 8, "-o", "out").code == 0
    document = ptq("inspect", "out", "--json").document
    assert document["kind"] == "quantized"
    assert {layer["bits"] for layer in document["layers"]} == {8}
    inputs = {layer["inputs"] for layer in document["layers"]}
    assert inputs == ({None} if command == "rtn" else {"8 bits, dynamic per token"})
    assert ptq("inspect", "out").code == 0


def test_a_smoothed_float_model_is_a_float_model(sample):
    assert ptq("smoothquant", sample, "--bits", 16, "-o", "smoothed").code == 0
    document = ptq("inspect", "smoothed", "--json").document
    assert document["kind"] == "float"
    assert document["family"] == "llama"
    outcome = ptq("pack", "smoothed", "-o", "packed")
    assert outcome.code == 0, outcome.err
    assert ptq("inspect", "packed", "--json").document["kind"] == "quantized"


def test_a_float_model_says_what_the_default_grid_would_make_of_it(sample):
    entry = ptq("inspect", sample, "--json").document["quantizing"]
    assert ptq("rtn", sample, "-o", "out", "--json").code == 0
    totals = json.loads(Path("out/report.json").read_text())["totals"]
    assert entry == {
        "bits": 4, "group_size": 128, "layers": totals["layers"],
        "bytes_before": totals["bytes_before"], "bytes_after": totals["bytes_after"],
    }  # fmt: skip
    assert "14 tensors" in ptq("inspect", sample).out


def test_a_model_without_anything_to_quantize(tmp_path):
    path = write_model(tmp_path / "m.safetensors", {"x": np.ones(3, np.float32)})
    assert "refused" in ptq("inspect", path, "--json").document["quantizing"]
    outcome = ptq("inspect", path)
    assert (outcome.code, "cannot be quantized" in outcome.out) == (0, True)


@pytest.mark.parametrize("name", ["ptq", "gptq", "awq", "compressed-tensors", "mlx"])
@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_layers_of_every_layout_with_their_grids_and_sizes(made, name, file):
    """By the folder, and by its weights file: MLX's had passed for a float model."""
    asym = ["--asym"] if name in ("awq", "mlx") else []
    out = made("rtn", "--group-size", 64, *asym, "--format", name)
    outcome = ptq("inspect", out / file, "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert (document["kind"], document["format"]) == ("quantized", name)
    rows = json.loads((out / "report.json").read_text())["layers"]
    sizes = {row["module"]: (row["bytes"], row["bits_per_weight"]) for row in rows}
    found = {x["module"]: (x["bytes"], x["bits_per_weight"]) for x in document["layers"]}
    assert found == sizes
    assert {layer["method"] for layer in document["layers"]} == {"rtn"}
    left = {entry["tensor"] for entry in document["tensors"] if entry["left_alone"]}
    assert "model.norm.weight" in left
    assert not any("_proj" in tensor for tensor in left)
    if file:
        assert "14 layers, 14 with 4 bits in groups of 64" in ptq("inspect", out).out


def test_an_mlx_file_is_never_taken_for_a_float_model(sample):
    outcome = ptq("rtn", sample, "--asym", "--group-size", 32, "--format", "mlx", "-o", "out")
    assert outcome.code == 0, outcome.err
    alone = Path("alone").mkdir() or Path("alone/model.safetensors")
    alone.write_bytes(Path("out/model.safetensors").read_bytes())
    for command in (["rtn"], ["inspect"], ["calibrate", "--activations", sample / "activations"]):
        outcome = ptq(*command, alone)
        assert (outcome.code, len(outcome.errors)) == (1, 1), outcome
        assert "quantized" in outcome.err
    assert "config.json" in ptq("inspect", alone).err


@pytest.mark.parametrize("source", [llama, llava, mixtral])
@pytest.mark.parametrize("packed", [False, True])
def test_one_screen_says_what_is_quantized_and_what_stays_dense_and_why(tmp_path, source, packed):
    path = source(tmp_path / "m")
    if packed:
        assert ptq("rtn", path, "-g", 32, "--ignore", "layers.1.mlp|w2", "-o", "out").code == 0
        path = "out"
    document, lines = ptq("inspect", path, "--json").document, ptq("inspect", path).out.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    text = " ".join(line.strip() for line in lines)
    reasons = {entry["left_alone"] for entry in document["tensors"]} - {None}
    assert "embedding (" in text
    assert ("not of the text model (" in text) == (source is llava)
    assert ("router (" in text) == (source is mixtral)
    assert ("not quantized (" in text) == ("not quantized" in reasons) == packed
    assert len(lines) < len(ptq("inspect", path, "--tensors").out.splitlines())


def test_every_tensor_only_with_an_option(sample):
    name = "model.layers.1.mlp.up_proj.weight"
    assert name not in ptq("inspect", sample).out
    assert name in ptq("inspect", sample, "--tensors").out
    assert name in ptq("inspect", sample, "--json").out


def test_many_names_are_cut_to_one_screen(tmp_path):
    rng = np.random.default_rng(3)
    names = {"".join(rng.choice(list("abcdefgh"), 40)) for _ in range(300)}
    tensors = {f"{name}.weight": np.ones((2, 2), np.float32) for name in names}
    tensors |= {f"{name}.bias": np.ones(2, np.float32) for name in names}
    lines = ptq("inspect", write_model(tmp_path / "m.safetensors", tensors)).out.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    assert any(" more" in line for line in lines)
