"""In a cross attention q, k and v do not share inputs: each needs a file."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.models.linears import is_cross_attention, left_alone
from tests.builders import ptq, random_inputs, random_weight, write_model
from tests.refusals import refused

NAMES = {"bart": ("encoder_attn", "q_proj", "k_proj", "v_proj"), "t5": ("EncDecAttention", *"qkv")}


@pytest.fixture(params=NAMES)
def block(request, tmp_path, monkeypatch):
    """A model of one self attention and one cross attention, and what all of its linears see."""
    monkeypatch.chdir(tmp_path)
    cross, *own = NAMES[request.param]
    selves = [f"decoder.0.self_attn.{name}" for name in own]
    crosses = [f"decoder.0.{cross}.{name}" for name in own]
    write_model(
        tmp_path / "model.safetensors",
        {
            f"{name}.weight": random_weight(16, 32, seed=n)
            for n, name in enumerate(selves + crosses)
        },
    )
    (tmp_path / "acts").mkdir()
    np.save(tmp_path / "acts" / f"{selves[0]}.npy", random_inputs(64, 32))
    return selves, crosses


def save(name, seed):
    np.save(f"acts/{name}.npy", random_inputs(64, 32, seed=seed))


def test_missing_files_are_named(block):
    _, (q, k, _v) = block
    save(q, 1)
    words = ("2 linears", k.rpartition(".")[0], "in a cross attention q, k and v need a file each")
    refused("calibrate", "model.safetensors", "--activations", "acts", words=words)
    words = ("2 layers", *words[1:])
    refused("gptq", "model.safetensors", "--activations", "acts", "--group-size", 32, words=words)


def test_each_has_its_own(block):
    (first, *_), crosses = block
    for seed, name in enumerate(crosses, 1):
        save(name, seed)
    outcome = ptq("calibrate", "model.safetensors", "--activations", "acts", "--json")
    sites = outcome.document["sites"]
    assert {site: len(entry["linears"]) for site, entry in sites.items()} == {
        first: 3,
        **dict.fromkeys(crosses, 1),
    }


@pytest.mark.parametrize(
    ("module", "crosses"),
    [
        ("model.decoder.layers.0.encoder_attn.k_proj", True),
        ("decoder.block.0.layer.1.EncDecAttention.q", True),
        ("bert.encoder.layer.0.crossattention.self.query", True),
        ("qformer.encoder.layer.0.crossattention.attention.key", True),
        ("decoder.layer.0.encoder_decoder_attention.attention.value", True),
        ("model.language_model.layers.3.cross_attn.q_proj", True),
        ("decoder.layers.0.src_attn.v_proj", True),
        ("model.layers.0.xattn.q_proj", True),
        ("model.encoder.layers.0.self_attn.q_proj", False),
        ("encoder.layer.0.attention.self.query", False),
        ("model.cross_attention_layers.0.self_attn.q_proj", False),
        ("model.layers.3.cross_attn.gate_proj", False),
        ("model.layers.0.linear_attn.in_proj_qkvz", False),
    ],
)
def test_names_of_cross_attentions(module, crosses):
    assert is_cross_attention(module) == crosses


def test_a_table_of_biases_is_an_embedding():
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert left_alone({name: TensorSpec(name, "F32", (32, 8))}, {}) == {name: "embedding"}


def test_statistics_that_share_otherwise_do_not_merge(block):
    (_q, k, _v), crosses = block
    for seed, name in enumerate(crosses, 1):
        save(name, seed)
    arguments = ("calibrate", "model.safetensors", "--activations", "acts", "-o")
    assert ptq(*arguments, "a.safetensors").code == 0
    save(k, 0)
    assert ptq(*arguments, "b.safetensors").code == 0
    parts = ("--merge", "a.safetensors", "--merge", "b.safetensors")
    words = ("b.safetensors", "shares its inputs with other linears than in a.safetensors")
    refused("calibrate", "model.safetensors", *parts, "-o", "both.safetensors", words=words)
    assert ptq("calibrate", "model.safetensors", *parts[:2], *parts[:2], "-o", "twice.st").code == 0
