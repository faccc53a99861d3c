"""What stays in floating point: declared where it is a Linear, and said where it is much."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq, random_weight, write_model

BLOCK = "model.layers.0."
EXPERTS = f"{BLOCK}mlp.experts.w123"
COMPRESSED = ("--format", "compressed-tensors", "--group-size", 32)


def model(folder: Path, **more: np.ndarray) -> Path:
    """A block with four linears, in a family that nothing is known of, and `more` tensors."""
    folder.mkdir()
    own = {f"{BLOCK}self_attn.{part}_proj.weight": random_weight(64, 64) for part in "qkvo"}
    write_model(folder / "model.safetensors", own | more)
    (folder / "config.json").write_text('{"model_type": "brand_new", "dtype": "bfloat16"}')
    return folder


@pytest.fixture
def source(tmp_path):
    """A model with experts in a tensor of a layout that nothing is known of."""
    return model(tmp_path / "model", **{EXPERTS: random_weight(3, 96, 64)})


def test_much_that_stays_dense_is_said_and_strict_makes_it_an_error(tmp_path, source):
    """Most of a model stayed as it was: 503 -> 469 KiB, exit 0, no word."""
    outcome = ptq("pack", source, "-o", tmp_path / "out")
    assert outcome.code == 0
    (warning,) = outcome.warnings
    assert "53% of the bytes in the blocks stay in floating point: 1 tensors: rank 3" in warning
    assert f"{EXPERTS}. --include REGEX takes them in." in warning
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("53% of the bytes" in warning for warning in report["warnings"])
    assert ptq("pack", source, "-o", tmp_path / "x", "--strict").code == 1
    assert not (tmp_path / "x").exists()
    outcome = ptq("pack", source, "-o", tmp_path / "x", "--strict", "--include", "w123")
    assert (outcome.code, outcome.warnings) == (0, [])


def test_the_way_to_take_it_in_is_one_that_works(tmp_path, source):
    outcome = ptq("pack", source, "--dry-run", *COMPRESSED)
    assert "--include REGEX --format ptq takes them in." in outcome.warnings[0]
    words = ("--include", "w123", "--on-misfit", "keep")
    outcome = ptq("pack", source, "--dry-run", *COMPRESSED, *words)
    assert "--format ptq holds every layer." in outcome.warnings[0]


def test_what_was_left_out_on_purpose_is_not_held_against_it(tmp_path, source):
    outcome = ptq("pack", source, "-o", tmp_path / "out", "--strict", "--ignore", "w123")
    assert (outcome.code, outcome.warnings) == (0, [])
    outcome = ptq("pack", source, "-o", tmp_path / "x", "--strict", "--ignore", "w123|[qkv]_proj")
    assert (outcome.code, outcome.warnings) == (0, [])


def test_little_is_not_worth_a_word(tmp_path):
    source = model(tmp_path / "model", **{f"{BLOCK}mixer.conv1d.weight": random_weight(64, 1, 4)})
    outcome = ptq("pack", source, "-o", tmp_path / "out", "--strict")
    assert (outcome.code, outcome.warnings) == (0, [])


def test_every_dense_linear_is_declared(tmp_path):
    """A head that is called an embedding, and a projection inside a module of embeddings were not:
    loaders took them for quantized ones."""
    more = {
        "model.embed_vision.projection.weight": random_weight(64, 64),
        "embed_out.weight": random_weight(50, 64),
        "model.embed_tokens.weight": random_weight(50, 64),
    }
    source, out = model(tmp_path / "model", **more), tmp_path / "out"
    assert ptq("pack", source, "-o", out, *COMPRESSED).code == 0
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    wanted = {name.removesuffix(".weight") for name in more} - {"model.embed_tokens"}
    assert {*ignore} == {*wanted, "lm_head"}


def test_a_bare_parameter_is_no_weight_of_a_linear(tmp_path):
    bare = "multi_modal_projector.mm_input_projection_weight"
    source = model(tmp_path / "model", **{bare: random_weight(64, 64)})
    words = ("pack", source, "-o", tmp_path / "out", *COMPRESSED, "--include", "multi_modal")
    assert "not bare parameters" in ptq(*words).err
    assert not (tmp_path / "out").exists()
