"""--tokens on models with images: their text part is calibrated and measured like the text model
alone, whatever its tensors' names begin with; tokens that stand for images are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.builders import ptq
from tests.run.tiny_llama import CONFIG, tiny_llama

# model_type, and what stands in place of "model." and "lm_head"
KINDS = {
    "published": ("llava", "language_model.model.", "language_model.lm_head"),
    "transformers 4.52": ("llava_next", "model.language_model.", "lm_head"),
}
FLAT = ("qwen2_5_vl", "model.", "lm_head")  # config.json has no text_config
SETTINGS = ("--bits", 3, "--group-size", 8)


def vision_model(folder: Path, source: Path, kind: str, prefix: str, head: str) -> Path:
    """The text model of a folder beside a tower."""
    tensors = load_file(source / "model.safetensors")
    inside = {
        name.replace("model.", prefix).replace("lm_head", head): values
        for name, values in tensors.items()
    }
    tower = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    inside["vision_tower.layers.0.self_attn.q_proj.weight"] = tower
    config: dict[str, Any] = {"image_token_index": 39, "text_config": CONFIG}
    if kind == FLAT[0]:
        mrope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        config = {**CONFIG, "rope_scaling": mrope}
        inside |= {
            name.replace("weight", "bias"): np.zeros(len(values), np.float32)
            for name, values in inside.items()
            if re.search("layers.*[qkv]_proj", name) and name.startswith("model.")
        }
    config |= {"model_type": kind, "tie_word_embeddings": False}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(inside, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("text") / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(1).integers(0, 39, (16, 12)))
    tokens = ("--tokens", folder / "tokens.npy")
    assert ptq("gptq", folder, *SETTINGS, *tokens, "-o", folder / "q").code == 0
    measured = ptq("eval", folder, folder / "q", *tokens, "--json").document["quality"]
    (folder / "quality.json").write_text(json.dumps(measured))
    return folder


@pytest.mark.parametrize("kind", [*KINDS.values(), FLAT], ids=[*KINDS, "flat"])
def test_the_text_part_is_that_of_the_text_model(
    kind: tuple[str, str, str], text: Path, tmp_path: Path
) -> None:
    _, prefix, head = kind
    model = vision_model(tmp_path / "model", text, *kind)
    tokens = ("--tokens", text / "tokens.npy")
    outcome = ptq("gptq", model, *SETTINGS, *tokens, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    ours, alone = (load_file(f / "model.safetensors") for f in (tmp_path / "out", text / "q"))
    for name, values in alone.items():
        inside = name.replace("model.", prefix, 1).replace("lm_head", head)
        np.testing.assert_array_equal(ours[inside], values)
    tower = "vision_tower.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(ours[tower], load_file(model / "model.safetensors")[tower])
    measured = ptq("eval", model, tmp_path / "out", *tokens, "--json").document["quality"]
    assert measured == json.loads((text / "quality.json").read_text())


def test_sizes_that_the_text_config_leaves_out_are_transformers_own(
    text: Path, tmp_path: Path
) -> None:
    model = vision_model(tmp_path / "model", text, *KINDS["published"])
    path = model / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]["hidden_size"]
    path.write_text(json.dumps(config))
    outcome = ptq("calibrate", model, "--tokens", text / "tokens.npy", "-o", tmp_path / "out.st")
    assert outcome.code == 1
    assert "4096" in outcome.err


def test_tokens_that_stand_for_images_are_refused(text: Path, tmp_path: Path) -> None:
    model = vision_model(tmp_path / "model", text, *KINDS["published"])
    tokens, mask = np.load(text / "tokens.npy"), np.ones((16, 12), np.uint8)
    tokens[3, 5:7] = 39
    mask[3, 5:7] = 0
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "mask.npy", mask)
    given = ("--tokens", tmp_path / "tokens.npy", "-o", tmp_path / "out.st")
    outcome = ptq("calibrate", model, *given)
    assert outcome.code == 1
    assert "2 tokens are 39" in outcome.err
    assert "image_token_index" in outcome.err
    assert not (tmp_path / "out.st").exists()
    assert ptq("calibrate", model, *given, "--mask", tmp_path / "mask.npy").code == 0


def test_a_model_whose_prompts_see_both_ways_is_refused(text: Path, tmp_path: Path) -> None:
    model = vision_model(tmp_path / "model", text, "paligemma", *KINDS["published"][1:])
    outcome = ptq("calibrate", model, "--tokens", text / "tokens.npy", "-o", tmp_path / "out.st")
    assert outcome.code == 1
    assert "paligemma" in outcome.err
    assert "both directions" in outcome.err
