"""`--scale-dtype auto`: what config.json and the tensors say of the model's dtype, together; the
default command works with whatever they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.commands.quantize import prepare
from tests.builders import ptq, random_weight, read_model, write_model

SHAPES = {
    "q_proj": (16, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 16)
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "vocab_size": 48, "max_position_embeddings": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip
NUMPY = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
TENSORS = {"F16": ["F16"], "BF16": ["BF16"], "F32": ["F32"], "mixed": ["BF16", "F16"]}
WORDS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
STATED = [(key, word) for key in ("dtype", "torch_dtype", "text") for word in WORDS] + [("", "")]


def model(key: str = "", word: str = "", tensors: str = "F32") -> Path:
    """A folder whose config.json states `word` under `key` ("text": inside `text_config`), and
    whose tensors take turns."""
    folder = Path("model")
    folder.mkdir()
    config: dict[str, Any] = {**CONFIG, key: word} if key else dict(CONFIG)
    if key == "text":
        config = {"model_type": "llava", "text_config": {**CONFIG, "dtype": word}}
    (folder / "config.json").write_text(json.dumps(config))
    path, turns = "model.layers.0.self_attn", TENSORS[tensors]
    shapes = {"model.embed_tokens": (48, 32), **{f"{path}.{n}": s for n, s in SHAPES.items()}}
    weights = {
        f"{name}.weight": random_weight(*shape, seed=i, dtype=NUMPY[turns[i % len(turns)]])
        for i, (name, shape) in enumerate(shapes.items())
    }
    write_model(folder / "model.safetensors", weights)
    return folder


def scale_dtypes(ending: str) -> dict[str, str]:
    """The dtype of each linear's scales in `out`."""
    found = read_model(Path("out/model.safetensors"))
    names = {name.split(".")[-2]: entry[0] for name, entry in found.items() if ending in name}
    return {name: names[name] for name in SHAPES}


def expected(key: str, word: str, tensors: str) -> str:
    """What loaders hold a model in: what config.json says, else the narrowest of what is there."""
    if key in ("dtype", "torch_dtype"):
        return WORDS[word]
    there = {*TENSORS[tensors], WORDS.get(word)}
    return next(dtype for dtype in ("BF16", "F16", "F32") if dtype in there)


@pytest.mark.parametrize("tensors", TENSORS)
@pytest.mark.parametrize(("key", "word"), STATED)
def test_compressed_tensors_has_the_scales_that_loaders_hold(key, word, tensors):
    folder = model(key, word, tensors)
    options = ["--group-size", 16, "--format", "compressed-tensors"]
    assert ptq("pack", folder, *options, "-o", "out").code == 0
    found = scale_dtypes(".weight_scale")
    assert set(found.values()) == {expected(key, word, tensors)}
    assert ptq("eval", folder, "out").code == 0
    again = ptq("pack", "out", "--format", "compressed-tensors", "-o", "again")
    assert again.code == 0, again.err


@pytest.mark.parametrize(("key", "word"), [*STATED[:3], STATED[-1]])
def test_no_format_refuses_what_it_chose_itself(key, word):
    for tensors in TENSORS:
        folder = model(key, word, tensors).rename(tensors)
        for form in ("ptq", "gptq", "awq", "mlx", "onnx"):
            given = {"group_size": 32, "format": form, "ignore": ("o_proj",)}
            assert len(prepare("pack", folder, given, {}).plan.layers) == 3


@pytest.mark.parametrize("tensors", TENSORS)
def test_mlx_has_the_scales_of_each_tensor(tensors):
    folder = model("", "", tensors)
    options = ["-g", 32, "--format", "mlx", "--ignore", "o_proj", "-o", "out"]
    assert ptq("pack", folder, *options).code == 0
    found = read_model(Path("out/model.safetensors"))
    turns = [*TENSORS[tensors], *TENSORS[tensors]][1 % len(TENSORS[tensors]) :]
    for name, dtype in zip(["q_proj", "k_proj"], turns, strict=False):
        assert found[f"model.layers.0.self_attn.{name}.scales"][0] == dtype


def test_mlx_takes_another_dtype_where_the_models_is_too_narrow():
    """Asymmetric, with 8 bits: bfloat16 would round an offset by up to a whole step."""
    folder = model("dtype", "bfloat16", "BF16")
    options = ["-g", 32, "-b", 8, "--asym", "--format", "mlx", "--ignore", "o_proj"]
    assert ptq("pack", folder, *options, "-o", "out").code == 0
    found = read_model(Path("out/model.safetensors"))
    assert found["model.layers.0.self_attn.q_proj.scales"][0] == "F16"


@pytest.mark.parametrize("tensors", ["F16", "BF16", "F32"])
def test_another_dtype_is_refused_with_one_that_works(tensors):
    """Scales are compared with what loaders hold, not with the tensors that happen to be there."""
    folder = model("dtype", "bfloat16", tensors)
    options = ["-g", 16, "--format", "compressed-tensors", "-o", "out"]
    (error,) = ptq("pack", folder, *options, "--scale-dtype", "float16").errors
    assert "cast scales to the model's BF16, which cannot hold float16" in error
    assert "--scale-dtype bfloat16" in error
    assert ptq("pack", folder, *options, "--scale-dtype", "bfloat16").code == 0


def test_packing_again_knows_the_models_dtype():
    folder = model("dtype", "bfloat16", "F16")
    words = ["pack", folder, "-g", 16, "-o", "native"]
    assert ptq(*words, "--scale-dtype", "bfloat16").code == 0
    assert ptq("pack", "native", "--format", "compressed-tensors", "-o", "out").code == 0
    assert set(scale_dtypes(".weight_scale").values()) == {"BF16"}
    assert ptq("pack", folder, "-g", 16, "-o", "other").code == 0
    (error,) = ptq("pack", "other", "--format", "compressed-tensors", "-o", "more").errors
    assert "--scale-dtype bfloat16 when the float model is quantized" in error
