"""`ptq gptq --tokens --drift`: making up for what the layers before a layer left wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ptq_cli
from ptq_cli.errors import InputError
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import stages
from tests.builders import ptq
from tests.models.test_forward import LLAMA

FAST = ("--bits", 3, "--sweeps", 0, "--refine", 0, "--no-mse", "--quiet")


def strengths(sample, n, *options):
    """Of each layer, by module; n: sequences of 64 tokens."""
    np.save("ids.npy", np.load(sample / "calibration_tokens.npy")[:n, :64])
    outcome = ptq("gptq", sample, "--tokens", "ids.npy", *FAST, "--json", "-o", "out", *options)
    assert outcome.code == 0, outcome.err
    return {row["module"]: row.get("drift") for row in outcome.document["layers"]}, outcome


def test_the_report_shows_what_held_out_sequences_bear_out(sample):
    found, outcome = strengths(sample, 24)
    first = [found.pop(f"model.layers.0.self_attn.{name}_proj") for name in "qkv"]
    assert first == [0, 0, 0]  # nothing is wrong before the first layer
    assert all(0 < strength <= 1 for strength in found.values())
    assert len(set(found.values())) > 10
    assert not any("held out" in line for line in outcome.warnings)
    stored = json.loads(Path("out/report.json").read_text())["layers"]
    assert {row["module"]: row["drift"] for row in stored if row["drift"]} == found


def test_a_number_is_taken_as_it_is(sample):
    assert set(strengths(sample, 24, "--drift", 0.25)[0].values()) == {0.25}


def test_zero_corrects_nothing(sample):
    assert set(strengths(sample, 8, "--drift", 0)[0].values()) == {None}


def test_too_few_tokens_to_hold_any_out_are_said(sample):
    np.save("ids.npy", np.load(sample / "calibration_tokens.npy")[:1, :7])
    outcome = ptq("gptq", sample, "--tokens", "ids.npy", *FAST, "--json", "-o", "out")
    assert "ptq: warning: none of 7 tokens is held out: --drift auto is 0.75" in outcome.warnings
    assert {row["drift"] for row in outcome.document["layers"]} == {0.75}


@pytest.mark.parametrize(
    ("masked", "count"),
    [
        *((True, 1), (False, 2), (True, 9)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 1), (False, 9))),
    ],
)
def test_any_number_of_sequences_will_do(sample, count, masked):
    mask = np.ones((count, 64), np.uint8)
    mask[::2, 40:] = not masked
    np.save("mask.npy", mask)
    found, _ = strengths(sample, count, "--mask", "mask.npy", "--fallback", "rtn")
    assert len(found) == 14


def test_a_model_without_its_head_is_rounded_all_the_same(sample):
    path = Path("bare")
    shutil.copytree(sample, path)
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    tensors.pop("lm_head.weight", None)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert len(strengths(path, 9)[0]) == 14


def test_python_takes_no_truth_for_a_strength(sample):
    with pytest.raises(InputError, match="drift = True"):
        ptq_cli.gptq(sample, tokens=sample / "calibration_tokens.npy", drift=True, output="out")


@pytest.mark.parametrize("given", ["much", "1.5", "nan", "-0.5"])
def test_anything_else_is_refused(sample, given):
    outcome = ptq("gptq", sample, "--tokens", "ids.npy", "--drift", given, "-o", "out")
    assert outcome.code == 1
    assert outcome.err.startswith("ptq: error: drift = ")


@pytest.mark.parametrize(
    ("config", "adds"),
    [
        ({"model_type": "llama"}, ["self_attn.o_proj", "mlp.down_proj"]),
        ({"model_type": "gpt2", "n_embd": 16}, ["attn.c_proj", "mlp.c_proj"]),
        ({"model_type": "opt", "do_layer_norm_before": False}, ["self_attn.out_proj", "fc2"]),
        # norms lie between the linear and the sum
        ({"model_type": "gemma2"}, []),
        ({"model_type": "gemma3_text"}, []),
        # experts give a part of the sum each
        ({"model_type": "mixtral"}, ["self_attn.o_proj"]),
        ({"model_type": "qwen3_moe"}, ["self_attn.o_proj"]),
    ],
)
def test_linears_that_add_to_the_residual_stream_are_known(config, adds):
    experts = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 8}
    extra = {"n_layer": 1, "n_head": 2, "ffn_dim": 16, "word_embed_proj_dim": 16, "head_dim": 8}
    arch = read_architecture({**LLAMA, **experts, **extra, **config})
    found = [stage.adds for stage in stages(arch, 0, pack((1, 2))) if stage.adds]
    assert [site.split("0.", 1)[1] for site in found] == adds
