"""Mixtures and latent attention from tokens: what sites see, what is rounded, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import ptq
from tests.refusals import refused
from tests.run.test_in_sequence import observed
from tests.run.tiny_families import CONFIGS, tiny_model

KINDS = pytest.mark.parametrize("kind", CONFIGS)
FAST = ("--bits", 8, "--group-size", 8, "--refine", 0, "--sweeps", 0, "--no-mse", "--drift", 0)


@pytest.fixture
def model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny_model(Path("model"), kind)


@KINDS
def test_statistics_are_of_what_the_forward_sees(model: Path) -> None:
    """The states between steps go through files."""
    tokens = ("--tokens", model / "tokens.npy", "--heldout-every", 0, "--min-expert-tokens", 1)
    outcome = ptq("calibrate", model, *tokens, "-o", "stats.safetensors")
    assert outcome.code == 0, outcome.err
    statistics, ids = open_calibration(Path("stats.safetensors")), np.load(model / "tokens.npy")
    seen = observed(open_checkpoint(model).read, ids, model=model)
    assert set(statistics.sites) == {"lm_head", *seen}
    for site in seen:
        found, inputs = statistics.load(site), seen[site].astype(float)
        assert found.n_tokens == len(inputs)
        wanted = inputs.T @ inputs / len(inputs)
        np.testing.assert_allclose(found.hessian, wanted, rtol=1e-3, atol=1e-4)


@KINDS
def test_every_linear_is_calibrated(model: Path) -> None:
    outcome = ptq(
        "gptq", model, "--tokens", model / "tokens.npy", *FAST, "-o", "out", "--json", "--quiet"
    )
    assert outcome.code == 0, outcome.err
    rows = {row["module"]: row for row in outcome.document["layers"]}
    linears = {
        name.removesuffix(".weight")
        for name, spec in open_checkpoint(model).specs.items()
        if len(spec.shape) == 2 and ".layers." in name
    }
    routers = {name for name in linears if name.endswith(("mlp.gate", "router", "expert_gate"))}
    assert set(rows) == linears - routers
    assert all(row["calibrated"] for row in rows.values())
    routed = {module for module, row in rows.items() if row.get("own_tokens") is not None}
    assert routed == {module for module in rows if ".experts." in module}


@pytest.mark.parametrize("kind", ["deepseek_v3"])
def test_what_is_cached_are_no_keys_and_values_of_heads(model: Path) -> None:
    words = ("--kv-cache rounds the keys and values of each head",)
    given = ("--tokens", "model/tokens.npy", "--group-size", 8, "--kv-cache", "fp8", "-o", "out")
    refused("gptq", model, *given, words=words)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt_oss", "model.layers.1.self_attn.sinks"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek_v3", "model.layers.0.self_attn.kv_a_layernorm.weight"),
    ],
)
def test_further_tensors_have_the_size_that_config_json_makes(model: Path, name: str) -> None:
    tensors = load_file(model / "model.safetensors")
    width = len(tensors[name])
    tensors[name] = np.ones(width + 1, np.float32)
    save_file(tensors, model / "model.safetensors")
    words = (name, f"[{width + 1}]", f"[{width}]")
    refused("gptq", model, "--tokens", "model/tokens.npy", "-o", "out", words=words)


@pytest.mark.parametrize("kind", ["deepseek_v3"])
def test_ranks_that_contradict_the_tensors(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 24}))
    words = ("kv_a_proj_with_mqa.weight", "[20, 32]", "[28, 32]", "ranks 16 and 24")
    refused("gptq", model, "--tokens", "model/tokens.npy", "-o", "out", words=words)


@pytest.mark.parametrize(
    ("kind", "inside"),
    [("deepseek_v3", {"q_b_proj", "kv_b_proj", "o_proj"}), ("qwen2_moe", {"o_proj", "down_proj"})],
)
def test_what_is_smoothed_in_sequence_computes_what_it_did(model: Path, inside: set[str]) -> None:
    """Norms inside a branch take factors, too: what they feed is then seen anew."""
    given = ("--tokens", model / "tokens.npy", "--then", "rtn", "--alpha", 0.5, "-o", "out")
    outcome = ptq("smoothquant", model, *given, "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    smoothed = [row for row in outcome.document["layers"] if row["method"] != "rtn"]
    assert {row["module"].rpartition(".")[2] for row in smoothed} >= inside
    assert max(row["heldout_rel_err"] for row in smoothed) < 0.02
