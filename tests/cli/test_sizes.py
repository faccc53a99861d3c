"""config.json that contradicts the tensors, or lacks what the forward needs, with --tokens: one
line with both values, before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.models.families import FAMILIES
from ptq_cli.models.family import Family
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.sizes import check_sizes
from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import SAMPLE, ptq
from tests.models.test_forward import QWEN3_MOE, random_weights
from tests.models.test_records import SIZES
from tests.run.tiny_llama import tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sizes") / "model")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "config.json").write_text(json.dumps(QWEN3_MOE))
    save_file(random_weights(read_architecture(QWEN3_MOE)), folder / "model.safetensors")
    np.save(folder / "tokens.npy", np.arange(48).reshape(4, 12))
    return folder


def refused(model: Path, tmp_path: Path, **change: Any) -> str:
    """What calibrate says of a model with another config.json; nothing is written."""
    folder = tmp_path / "changed"
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    wanted = {k: v for k, v in {**config, **change}.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(wanted))
    (folder / "model.safetensors").symlink_to(model / "model.safetensors")
    out = tmp_path / "out.safetensors"
    outcome = ptq("calibrate", folder, "--tokens", model / "tokens.npy", "-o", out)
    assert outcome.code == 1, outcome.out
    assert [line.startswith("ptq: hint:") for line in outcome.err.splitlines()] == [False, True]
    assert not out.exists()
    return outcome.err


LLAMA = [
    ({"hidden_size": 64, "head_dim": 16}, ["embed_tokens.weight", "[40, 32]", "[40, 64]"]),
    ({"vocab_size": 50}, ["embed_tokens.weight", "[40, 32]", "[50, 32]"]),
    ({"num_attention_heads": 8}, ["q_proj.weight", "[32, 32]", "[64, 32]", "8 attention heads"]),
    ({"num_key_value_heads": 4}, ["k_proj.weight", "[16, 32]", "[32, 32]", "4 key heads"]),
    ({"head_dim": 16}, ["q_proj.weight", "[32, 32]", "[64, 32]", "16 channels"]),
    ({"intermediate_size": 64}, ["gate_proj.weight", "[48, 32]", "[64, 32]"]),
    ({"num_hidden_layers": 3}, ["num_hidden_layers is 3", "2 blocks"]),
    ({"num_hidden_layers": 1}, ["num_hidden_layers is 1", "2 blocks"]),
    (
        {"num_hidden_layers": 1, "num_nextn_predict_layers": 0},
        ["num_hidden_layers is 1", "num_nextn_predict_layers 0", "2 blocks"],
    ),
    ({"num_hidden_layers": 10**7}, ["num_hidden_layers is 10000000", "only 21 tensors"]),
    ({"mlp_bias": True}, ["no tensor 'model.layers.0.mlp.gate_proj.bias'"]),
    ({"model_type": "qwen3"}, ["no tensor 'model.layers.0.self_attn.q_norm.weight'"]),
    ({"rope_scaling": {"rope_type": "spiral"}}, ["spiral", "yarn"]),
]


@pytest.mark.parametrize(("change", "words"), LLAMA)
def test_both_values_are_said(
    change: dict[str, Any], words: list[str], llama: Path, tmp_path: Path
) -> None:
    said = refused(llama, tmp_path, **change)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_key_that_is_missing_is_named(key: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((llama / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(llama / "model.safetensors")
    given = ("--tokens", llama / "tokens.npy", "-o", tmp_path / "out")
    outcome = ptq("gptq", folder, *given)
    assert outcome.code == 1
    assert f"config.json's {key} is None" in outcome.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 6}, ["mlp.gate.weight", "[5, 32]", "[6, 32]", "6 experts"]),
        ({"moe_intermediate_size": 16}, ["[24, 32]", "[16, 32]", "intermediate size of 16"]),
    ],
)
def test_experts_are_counted(
    change: dict[str, Any], words: list[str], mixture: Path, tmp_path: Path
) -> None:
    said = refused(mixture, tmp_path, **change)
    assert all(word in said for word in words), said


def test_experts_that_the_router_does_not_know(mixture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = load_file(mixture / "model.safetensors")
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    tensors[name.format(5)] = tensors[name.format(0)]
    save_file(tensors, folder / "model.safetensors")
    for file in ("config.json", "tokens.npy"):
        (folder / file).symlink_to(mixture / file)
    said = refused(folder, tmp_path)
    assert "5 experts" in said
    assert name.format(5) in said


KERNELS = {"bamba": "mamba_d_conv", "qwen3_next": "linear_conv_kernel_dim"}
FORWARDS = [family for family in FAMILIES if family.forward]


@pytest.mark.parametrize("family", FORWARDS, ids=lambda family: family.name)
def test_every_branch_says_the_shapes_of_its_linears(family: Family) -> None:
    arch = read_architecture({**SIZES, "model_type": family.model_types[-1]})
    for block in arch.blocks:
        for branch in (block.mixer, block.feed_forward):
            steps = branch.steps(pack((1, 2)), None)
            linears = {own for step in steps for some in step.sites.values() for own in some}
            assert set(branch.shapes(arch.hidden_size).of) == linears


@pytest.mark.parametrize(("kind", "key"), KERNELS.items())
def test_convolutions_see_as_many_tokens_as_config_json_says(kind: str, key: str) -> None:
    config = {**SIZES, "model_type": kind, key: 3}
    mixer = read_architecture(config).blocks[0].mixer
    made = mixer.shapes(SIZES["hidden_size"])
    assert [tokens for _, tokens in made.convolutions.values()] == [3]
    assert "a convolution of 3 tokens" in made.sizes


def test_a_model_without_a_head_predicts_nothing(llama: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    tensors = load_file(llama / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").symlink_to(llama / "config.json")
    assert ptq("rtn", folder, "--group-size", "16", "-o", out).code == 0
    outcome = ptq("eval", folder, out, "--tokens", llama / "tokens.npy")
    assert outcome.code == 1
    assert "no tensor 'lm_head.weight', which predictions need" in outcome.err
    assert "tie_word_embeddings: true" in outcome.err


def test_the_sample_is_what_its_config_says() -> None:
    checkpoint = open_checkpoint(SAMPLE)
    arch = read_architecture(checkpoint.config, checkpoint.tensors)
    check_sizes(arch, checkpoint.specs, checkpoint.config)
