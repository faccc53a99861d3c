"""`--kv-cache` where it cannot work: one line, nothing written; and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.builders import ptq
from tests.refusals import refused
from tests.run.tiny_llama import tiny_llama

TOKENS = ("--tokens", "model/tokens.npy", "--group-size", "16", "-o", "out")


@pytest.fixture
def model():
    return tiny_llama(Path("model"))


CASES = [
    ("gptq --kv-cache fp8 --format gptq", "gptq has no scales for a key-value cache in FP8"),
    ("awq --kv-cache fp8-head --format gptq_v2",
     "in FP8; --format ptq or --format compressed-tensors"),
    ("awq --kv-cache fp8 --parallel-layers", "leave --parallel-layers out"),
    ("smoothquant --kv-cache fp8 --bits 16", "--bits 16 writes float weights"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), CASES)
def test_refused(model, line, words):
    command, *options = line.split()
    refused(command, model, *TOKENS, *options, words=(words,))


@pytest.mark.parametrize("command", ["rtn", "gptq"])
def test_it_needs_tokens(model, command):
    words = ("--kv-cache fp8 does nothing here; it needs --tokens, --text or --chat",)
    refused(command, model, "--kv-cache", "fp8", "-o", "out", words=words)
    ptq("calibrate", model, "--tokens", "model/tokens.npy", "-o", "stats.safetensors")
    statistics = ("--calibration", "stats.safetensors")
    refused(command, model, "--kv-cache", "fp8", *statistics, "-o", "out", words=words)
    Path("recipe.toml").write_text('kv_cache = "fp8"')
    words = ("kv_cache (of the recipe) does nothing here; it needs --tokens, --text or --chat",)
    refused(command, model, "--config", "recipe.toml", "-o", "out", words=words)
    refused("pack", model, "--config", "recipe.toml", "-o", "out", words=words)


def test_it_needs_a_forward(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    refused("gptq", model, *TOKENS, "--kv-cache", "fp8", words=("no forward for model_type",))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_keys_that_are_not_finite_are_refused(model):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"] *= np.float32(1e38)
    save_file(weights, model / "model.safetensors")
    option = ("--kv-cache", "fp8", "--ignore", "self_attn")
    words = ("model.layers.1.self_attn: the model computes keys or values that are not finite",)
    refused("rtn", model, *TOKENS, *option, words=words)


def test_a_recipe_asks_for_it_and_the_report_says_what_is_used(model, check_report):
    Path("recipe.toml").write_text('kv_cache = "fp8"')
    outcome = ptq("rtn", model, *TOKENS, "--config", "recipe.toml")
    assert outcome.code == 0
    assert "FP8 range used by the cache: keys: every head at least" in outcome.out
    report = check_report(json.loads(Path("out/report.json").read_text()))
    assert [row["module"][-18:] for row in report["kv_cache"]] == [
        "layers.0.self_attn", "layers.1.self_attn",
    ]  # fmt: skip
    assert ptq("report", "out", "-o", "report.html").code == 0
    page = Path("report.html").read_text()
    assert "Key-value cache" in page
    assert f"{report['kv_cache'][1]['values']['used']:.0%}" in page
    again = ptq("rtn", model, *TOKENS, "--config", "recipe.toml")
    assert "FP8 range used by the cache" in again.out  # from the report of the earlier run


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"num_bits": 4}, "kv_cache_scheme of type 'float', 4 bits"),
        ({"type": None}, "kv_cache_scheme of type None, 8 bits"),
        ({"dynamic": True}, "dynamic True is not understood"),
        ({"strategy": "attn_head"}, "kv_cache_scheme says attn_head, but no k_scale is of that"),
        ("v_scale", "'model.layers.1.self_attn.v_scale' is missing, a scale of the key-value"),
        ("dtype", "'model.layers.1.self_attn.v_scale' is F64 [1]; scales of the key-value cache"),
    ],
)
def test_damaged_scales_are_refused(model, damage, words):
    made = ("--kv-cache", "fp8", "--format", "compressed-tensors")
    assert ptq("rtn", model, *TOKENS, *made).code == 0
    name, path = "model.layers.1.self_attn.v_scale", Path("out/model.safetensors")
    if isinstance(damage, dict):
        config = json.loads(Path("out/config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"] |= damage
        Path("out/config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(path)
        scale = tensors.pop(name)
        if damage == "dtype":
            tensors[name] = scale.astype(np.float64)
        save_file(tensors, path)
    refused("pack", "out", "-o", "packed", words=(words,))


def test_scales_of_another_model_are_refused(model):
    assert ptq("rtn", model, *TOKENS, "--kv-cache", "fp8").code == 0
    path = Path("out/model.safetensors")
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for letter in "kv":
        tensors[f"model.layers.7.self_attn.{letter}_scale"] = tensors.pop(
            f"model.layers.1.self_attn.{letter}_scale"
        )
    save_file(tensors, path, metadata)
    words = ("'model.layers.7.self_attn', which is no attention of the model",)
    refused("eval", model, "out", "--tokens", "model/tokens.npy", words=words)
