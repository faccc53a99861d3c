"""Blocks that predict further tokens, and tensors that no forward knows: runs from tokens round or
keep them, and name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import ptq
from tests.run.tiny_llama import tiny_llama

SETTINGS = ("--bits", 4, "--group-size", 16, "--json")
LINEARS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


def with_predictor(folder: Path, prefix: str, head: str) -> Path:
    """A tiny Llama whose last block stands again under `prefix`, with what joins two residuals."""
    tiny_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    again = {
        name.replace("model.layers.1.", prefix): values
        for name, values in tensors.items()
        if name.startswith("model.layers.1.")
    }
    again[f"{head}eh_proj.weight"] = np.ones((32, 64), np.float32)
    again[f"{head}enorm.weight"] = np.ones(32, np.float32)
    save_file({**tensors, **again}, folder / "model.safetensors")
    return folder


@pytest.fixture(params=[("model.layers.2.",) * 2, ("mtp.layers.0.", "mtp.")], ids=["after", "mtp"])
def predicting(request: Any, tmp_path: Path) -> tuple[Path, str, str]:
    prefix, head = request.param
    return with_predictor(tmp_path / "model", prefix, head), prefix, head


def test_its_linears_are_rounded_like_their_siblings(
    predicting: tuple[Path, str, str], tmp_path: Path
) -> None:
    model, prefix, head = predicting
    out = tmp_path / "out"
    given = ("--tokens", model / "tokens.npy", "--activation-scheme", "none", "-o", out)
    outcome = ptq("smoothquant", model, *SETTINGS, *given)
    assert outcome.code == 0, outcome.err
    report = outcome.document
    assert {f"{prefix}{name}" for name in LINEARS} < {row["module"] for row in report["layers"]}
    said = " ".join(report["warnings"])
    assert f"{head}eh_proj.weight" in said
    before, after = (load_file(f / "model.safetensors") for f in (model, out))
    for name in (f"{head}eh_proj.weight", f"{head}enorm.weight"):
        np.testing.assert_array_equal(after[name], before[name])


def test_they_are_rounded_to_nearest_and_named(
    predicting: tuple[Path, str, str], tmp_path: Path
) -> None:
    model, prefix, _ = predicting
    gptq = ptq("gptq", model, *SETTINGS, "--tokens", model / "tokens.npy", "-o", tmp_path / "gptq")
    rtn = ptq("rtn", model, *SETTINGS, "-o", tmp_path / "rtn")
    assert (gptq.code, rtn.code) == (0, 0)
    said = " ".join(gptq.document["warnings"])
    assert "7 layers of multi-token prediction, which no token reaches, are rounded" in said
    assert prefix in said
    ours, plain = (load_file(tmp_path / f / "model.safetensors") for f in ("gptq", "rtn"))
    packed = [name for name in plain if name.startswith(prefix) and "proj" in name]
    assert packed
    for name in packed:
        np.testing.assert_array_equal(ours[name], plain[name])


def test_those_whose_inputs_need_a_scale_stay_dense(
    predicting: tuple[Path, str, str], tmp_path: Path
) -> None:
    model, prefix, _ = predicting
    given = ("--tokens", model / "tokens.npy", "-o", tmp_path / "out", "--json")
    outcome = ptq("gptq", model, "--scheme", "FP8", *given)
    assert outcome.code == 0, outcome.err
    name = f"{prefix}mlp.up_proj.weight"
    written = open_checkpoint(tmp_path / "out").specs
    assert (written[name].dtype, f"{name}_scale" in written) == ("F32", False)
    assert "model.layers.0.mlp.up_proj.weight_scale" in written
    assert prefix.partition(".")[0] in " ".join(outcome.document["warnings"])


def test_statistics_from_tokens_do_for_them_too(
    predicting: tuple[Path, str, str], tmp_path: Path
) -> None:
    model = predicting[0]
    statistics, out = tmp_path / "statistics.safetensors", tmp_path / "out"
    assert ptq("calibrate", model, "--tokens", model / "tokens.npy", "-o", statistics).code == 0
    outcome = ptq("gptq", model, *SETTINGS, "--calibration", statistics, "-o", out)
    assert outcome.code == 0, outcome.err
    assert "7 layers of multi-token prediction" in str(outcome.document["warnings"])
    assert ptq("eval", model, out, "--tokens", model / "tokens.npy").code == 0


def test_unknown_tensors_stay_dense_unless_asked_for(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    extra = ["model.layers.0.self_attn.extra_proj.weight", "model.value.weight"]
    tensors |= {name: np.ones((32, 32), np.float32) for name in extra}
    save_file(tensors, model / "model.safetensors")
    given = ("--tokens", model / "tokens.npy", *SETTINGS)
    outcome = ptq("gptq", model, *given, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.document["warnings"])
    assert "2 tensors that the model's forward does not have stay in floating point" in said
    assert "extra_proj" in said
    after = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(after[extra[0]], tensors[extra[0]])
    outcome = ptq("gptq", model, *given, "--include", "extra_proj", "-o", tmp_path / "asked")
    assert outcome.code == 0, outcome.err
    assert extra[0].removesuffix(".weight") in {row["module"] for row in outcome.document["layers"]}


def test_more_blocks_than_config_json_says_are_predictors_where_it_says_so(
    tmp_path: Path,
) -> None:
    model = with_predictor(tmp_path / "model", "model.layers.2.", "mtp.")
    given = ("calibrate", model, "--tokens", model / "tokens.npy", "-o", tmp_path / "out")
    outcome = ptq(*given)
    assert outcome.code == 1
    assert "num_hidden_layers is 2, but there are 3 blocks alike" in outcome.err
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    assert ptq(*given).code == 0
