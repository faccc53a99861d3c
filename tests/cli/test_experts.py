"""Experts that a checkpoint stores as one tensor of all: quantized one by one, or kept so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ptq_cli
from ptq_cli.storage.sources import open_float
from tests.builders import ptq, random_weight, read_model, write_model

EXPERTS, HIDDEN, INNER, VOCABULARY = 3, 64, 32, 48
MLP, FEED_FORWARD = "model.layers.0.mlp.", "model.layers.0.feed_forward."
COMPRESSED = ("--format", "compressed-tensors", "--group-size", 32)
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "head_dim": 16,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip


def model(folder: Path, kind: str, mlp: dict[str, np.ndarray], **config: Any) -> Path:
    """A model folder with one block: attention and `mlp`."""
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": random_weight(VOCABULARY, HIDDEN, seed=1),
        "model.layers.0.input_layernorm.weight": np.ones(HIDDEN, np.float32),
        **{
            f"model.layers.0.self_attn.{part}_proj.weight": random_weight(HIDDEN, HIDDEN, seed=seed)
            for seed, part in enumerate("qkvo")
        },
        **{
            f"model.layers.0.self_attn.{part}_norm.weight": np.ones(16, np.float32) for part in "qk"
        },
        "model.layers.0.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
        **mlp,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": random_weight(VOCABULARY, HIDDEN, seed=2),
    }
    write_model(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **CONFIG, **config}))
    return folder


def linears() -> dict[str, np.ndarray]:
    """Each expert's own weights, `0.gate_proj` and so on."""
    shapes = {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    return {
        f"{expert}.{name}": random_weight(*shape, seed=10 * expert + place)
        for expert in range(EXPERTS)
        for place, (name, shape) in enumerate(shapes.items())
    }


def stack(part: str) -> np.ndarray:
    return np.stack([linears()[f"{expert}.{part}_proj"] for expert in range(EXPERTS)])


def one_by_one(folder: Path) -> Path:
    """Qwen3-MoE as it is published: a tensor for each expert's linears."""
    own = {f"{MLP}experts.{name}.weight": weight for name, weight in linears().items()}
    return model(folder, "qwen3_moe", {f"{MLP}gate.weight": random_weight(EXPERTS, HIDDEN), **own})


def stacked(
    folder: Path,
    kind: str = "qwen3_moe",
    inputs: str = "experts.gate_up_proj",
    output: str = "experts.down_proj",
) -> Path:
    """[experts, out, in], as transformers 5 keeps experts in memory."""
    own = {
        f"{MLP}gate.weight": random_weight(EXPERTS, HIDDEN),
        f"{MLP}{inputs}": np.concatenate([stack("gate"), stack("up")], axis=1),
        f"{MLP}{output}": stack("down"),
    }
    return model(folder, kind, own)


def llama4(folder: Path) -> Path:
    """[experts, in, out], gate and up as halves."""
    fused = np.concatenate([stack("gate"), stack("up")], axis=1).swapaxes(1, 2)
    own = {
        f"{FEED_FORWARD}router.weight": random_weight(EXPERTS, HIDDEN),
        f"{FEED_FORWARD}experts.gate_up_proj": np.ascontiguousarray(fused),
        f"{FEED_FORWARD}experts.down_proj": np.ascontiguousarray(stack("down").swapaxes(1, 2)),
    }
    return model(folder, "llama4_text", own)


def gpt_oss(folder: Path) -> Path:
    """[experts, in, out], gate and up in turns, with biases."""
    fused = np.empty((EXPERTS, HIDDEN, 2 * INNER), stack("gate").dtype)
    fused[..., ::2], fused[..., 1::2] = (stack(part).swapaxes(1, 2) for part in ("gate", "up"))
    own = {
        f"{MLP}router.weight": random_weight(EXPERTS, HIDDEN),
        f"{MLP}experts.gate_up_proj": fused,
        f"{MLP}experts.gate_up_proj_bias": random_weight(EXPERTS, 2 * INNER),
        f"{MLP}experts.down_proj": np.ascontiguousarray(stack("down").swapaxes(1, 2)),
        f"{MLP}experts.down_proj_bias": random_weight(EXPERTS, HIDDEN),
    }
    return model(folder, "gpt_oss", own)


@pytest.mark.parametrize("command", [("pack",), ("rtn",), ("pack", *COMPRESSED)])
def test_stacked_experts_become_what_those_stored_one_by_one_become(tmp_path, command):
    """Fused 3-D experts stayed dense, with exit 0 and no word: most of the model."""
    written = []
    for source in (one_by_one(tmp_path / "a"), stacked(tmp_path / "b")):
        out = tmp_path / f"{source.name}-out"
        outcome = ptq(*command[:1], source, "-o", out, "--group-size", 32, *command[1:])
        assert (outcome.code, outcome.warnings) == (0, []) or "NO CALIBRATION" in outcome.err
        written.append(read_model(out / "model.safetensors"))
    assert written[0] == written[1]


@pytest.mark.parametrize(("make", "experts"), [(llama4, FEED_FORWARD), (gpt_oss, MLP)])
def test_every_expert_is_a_linear_of_its_own(tmp_path, make, experts):
    """Slices, transposed and taken apart, are those of the layout that the family has."""
    out = tmp_path / "out"
    assert ptq("pack", make(tmp_path / "model"), "-o", out, "--bits", 8).code == 0
    for name, weight in linears().items():
        found = ptq_cli.load_weight(out, f"{experts}experts.{name}")
        np.testing.assert_allclose(found, weight.astype(np.float32), atol=1e-3)


def test_biases_of_experts_are_biases(tmp_path):
    source, out = gpt_oss(tmp_path / "model"), tmp_path / "out"
    assert ptq("pack", source, "-o", out).code == 0
    before, after = (read_model(folder / "model.safetensors") for folder in (source, out))
    assert not any(name.endswith("_bias") for name in after)
    fused = np.frombuffer(before[f"{MLP}experts.gate_up_proj_bias"][2], np.uint16)
    dtype, shape, data = after[f"{MLP}experts.1.up_proj.bias"]
    assert (dtype, shape) == ("BF16", [INNER])
    assert data == fused.reshape(EXPERTS, -1)[1, 1::2].tobytes()
    assert ptq_cli.load_linear(out, f"{MLP}experts.1.up_proj").bias is not None


def test_what_lies_in_order_is_read_where_it_lies_and_the_rest_an_expert_at_a_time(tmp_path):
    for make, experts, strided in ((stacked, MLP, 0), (llama4, FEED_FORWARD, 3), (gpt_oss, MLP, 3)):
        checkpoint = open_float(make(tmp_path / make.__name__))
        own = {n: t for n, t in checkpoint.tensors.items() if f"{experts}experts.0." in n}
        weights = [tensor for name, tensor in own.items() if name.endswith(".weight")]
        assert sum(tensor.strides is not None for tensor in weights) == strided
        assert all(t.extent <= t.part_of.spec.nbytes // EXPERTS for t in weights)


def test_experts_that_no_runtime_reads_one_by_one_are_refused_or_kept_as_they_are(tmp_path):
    source, out = gpt_oss(tmp_path / "model"), tmp_path / "out"
    outcome = ptq("pack", source, "-o", out, *COMPRESSED)
    assert outcome.code == 1
    assert not out.exists()
    assert "transformers reads the experts of gpt_oss only fused" in outcome.errors[0]
    assert "--on-misfit keep" in outcome.errors[0]
    outcome = ptq("pack", source, "-o", out, *COMPRESSED, "--on-misfit", "keep")
    assert outcome.code == 0
    assert "% of the bytes in the blocks stay in floating point" in outcome.warnings[0]
    before, after = (read_model(folder / "model.safetensors") for folder in (source, out))
    kept = [name for name in before if "experts" in name]
    assert len(kept) == 4
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}
    assert ptq("eval", source, out, "--json").document["warnings"] == [
        "no calibration: errors are those of the weights, not of the outputs"
    ]


@pytest.mark.parametrize("fmt", ["gptq", "awq", "mlx"])
def test_other_formats_refuse_them_too(tmp_path, fmt):
    for make in (gpt_oss, llama4):
        source = make(tmp_path / make.__name__)
        outcome = ptq("pack", source, "-o", tmp_path / "out", "--format", fmt, "--group-size", 32)
        assert outcome.code == 1
        assert f"no runtime that reads {fmt} takes the experts of" in outcome.errors[0]


def test_dense_experts_are_declared_where_each_is_a_linear(tmp_path):
    """Llama 4 in transformers: without their names in `ignore` all of them were noise."""
    source, out = llama4(tmp_path / "model"), tmp_path / "out"
    outcome = ptq("pack", source, "-o", out, *COMPRESSED, "--ignore", "experts")
    assert (outcome.code, outcome.warnings) == (0, [])
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    after = read_model(out / "model.safetensors")
    for name, weight in linears().items():
        assert f"{FEED_FORWARD}experts.{name}" in ignore
        assert after[f"{FEED_FORWARD}experts.{name}.weight"][2] == weight.tobytes()


def test_a_repacking_takes_them_apart_too(tmp_path):
    source, native, out = llama4(tmp_path / "model"), tmp_path / "native", tmp_path / "out"
    words = ("--ignore", "experts", "--group-size", 32, "--scale-dtype", "bfloat16")
    assert ptq("pack", source, "-o", native, *words).code == 0
    assert f"{FEED_FORWARD}experts.down_proj" in read_model(native / "model.safetensors")
    assert ptq("pack", native, "-o", out, "--format", "compressed-tensors").code == 0
    assert f"{FEED_FORWARD}experts.2.down_proj.weight" in read_model(out / "model.safetensors")


def test_a_repacking_of_experts_that_no_runtime_reads_is_refused(tmp_path):
    source, native = gpt_oss(tmp_path / "model"), tmp_path / "native"
    assert ptq("pack", source, "-o", native, "--group-size", 32).code == 0
    words = ("--format", "compressed-tensors", "--on-misfit", "keep")
    outcome = ptq("pack", native, "-o", tmp_path / "out", *words)
    assert outcome.code == 1
    assert "start from the float model" in outcome.errors[0]


def test_patterns_match_the_name_that_a_tensor_is_stored_under(tmp_path):
    out = tmp_path / "out"
    source = stacked(tmp_path / "model")
    assert ptq("pack", source, "-o", out, "--ignore", "gate_up_proj").code == 0
    after = read_model(out / "model.safetensors")
    assert (
        after[f"{MLP}experts.gate_up_proj"]
        == read_model(source / "model.safetensors")[f"{MLP}experts.gate_up_proj"]
    )
    assert any(name.startswith(f"{MLP}experts.0.down_proj.") for name in after)


def test_experts_of_unknown_families_are_for_the_native_format(tmp_path):
    source = stacked(tmp_path / "model", "brand_new_moe")
    outcome = ptq("pack", source, "-o", tmp_path / "out", *COMPRESSED)
    assert outcome.code == 1
    assert "not known that a runtime reads the experts of brand_new_moe" in outcome.errors[0]
    outcome = ptq("pack", source, "-o", tmp_path / "out")
    assert (outcome.code, outcome.warnings) == (0, [])


@pytest.mark.parametrize(
    ("inputs", "output"),
    [("input_linear.weight", "output_linear.weight"), ("experts.gate_up_proj.weight",
      "experts.down_proj.weight")],
)  # fmt: skip
def test_other_names_of_the_same(tmp_path, inputs, output):
    source = stacked(tmp_path / "model", "granitemoe", inputs, output)
    assert ptq("pack", source, "-o", tmp_path / "out", "--bits", 8).code == 0
    found = ptq_cli.load_weight(tmp_path / "out", f"{MLP}experts.2.up_proj")
    np.testing.assert_allclose(found, linears()["2.up_proj"].astype(np.float32), atol=1e-3)


def test_gate_and_up_may_be_a_stack_each(tmp_path):
    own = {f"{MLP}experts.{part}_proj": stack(part) for part in ("gate", "up", "down")}
    own = {f"{MLP}gate.weight": random_weight(EXPERTS, HIDDEN), **own}
    source = model(tmp_path / "model", "brand_new_moe", own)
    assert ptq("pack", source, "-o", tmp_path / "out", "--bits", 8).code == 0
    for name in ("2.up_proj", "1.down_proj"):
        found = ptq_cli.load_weight(tmp_path / "out", f"{MLP}experts.{name}")
        np.testing.assert_allclose(found, linears()[name].astype(np.float32), atol=1e-3)


def test_asymmetric_experts_are_refused_where_runtimes_fuse_them(tmp_path):
    """transformers dropped their zero points: logits off by more than half."""
    source = one_by_one(tmp_path / "model")
    outcome = ptq("pack", source, "-o", tmp_path / "out", *COMPRESSED, "--asym")
    assert outcome.code == 1
    assert "without their zero points" in outcome.errors[0]
    assert "--sym" in outcome.errors[0]
    assert ptq("pack", source, "-o", tmp_path / "out", "--asym").code == 0


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ('[[layers]]\nmatch = "experts.2"\nbits = 8\n', (), "has another grid than most layers"),
        ("", ("--ignore", "experts.2"), "is dense, an expert that transformers fuses"),
    ],
)
def test_check_knows_what_fused_experts_must_share(tmp_path, recipe, words, said):
    source, out = one_by_one(tmp_path / "model"), tmp_path / "out"
    (tmp_path / "recipe.toml").write_text(recipe)
    words = (*words, "--config", tmp_path / "recipe.toml")
    assert ptq("pack", source, "-o", out, *COMPRESSED, *words).code == 0
    outcome = ptq("check", out, "--runtime", "transformers")
    assert outcome.code == 3
    assert said in outcome.out


def test_a_second_run_finds_the_first_and_an_interrupted_one_its_units(tmp_path):
    source, out = gpt_oss(tmp_path / "model"), tmp_path / "out"
    assert ptq("pack", source, "-o", out).code == 0
    written = read_model(out / "model.safetensors")
    again = ptq("pack", source, "-o", out)
    assert (again.code, "finished" in again.err + again.out) == (0, True)
    other = ptq("pack", source, "-o", tmp_path / "two", "--workers", 2, "--max-shard-size", "20KB")
    assert other.code == 0
    shards = [read_model(path) for path in (tmp_path / "two").glob("*.safetensors")]
    assert {name: entry for shard in shards for name, entry in shard.items()} == written


def test_tokens_reach_stacked_experts(tmp_path):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (8, 16))
    np.save(tmp_path / "tokens.npy", tokens)
    words = ("--tokens", tmp_path / "tokens.npy", "--group-size", 32)
    written = []
    for source in (one_by_one(tmp_path / "a"), stacked(tmp_path / "b")):
        out = tmp_path / f"{source.name}-out"
        assert ptq("gptq", source, "-o", out, *words).code == 0
        written.append(read_model(out / "model.safetensors"))
    assert written[0] == written[1]
