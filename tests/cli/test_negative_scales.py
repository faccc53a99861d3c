"""A symmetric checkpoint with negative scales, as AutoRound writes: repacked anywhere and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq

pytest.importorskip("gguf")
pytest.importorskip("onnx")

FORMATS = ("ptq", "gptq", "gptq_v2", "awq", "compressed-tensors", "mlx", "gguf", "onnx")


@pytest.fixture(scope="module")
def foreign(
    one_block: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """GPTQ, half of whose scales are negative, and what its weights are."""
    folder = tmp_path_factory.mktemp("foreign")
    model, out = folder / "model", folder / "out"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((one_block / name).read_bytes())
    config = json.loads((one_block / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    tensors = load_file(one_block / "model.safetensors")
    halves = {name: values.astype(np.float16) for name, values in tensors.items()}
    save_file(halves, model / "model.safetensors")
    assert ptq("pack", model, "--format", "gptq", "-g", 64, "-o", out).code == 0
    opened, rng = open_quantized(out), np.random.default_rng(0)
    stored = load_file(out / "model.safetensors")
    weights = {module: opened.load(module).dequantized() for module in opened.layers}
    for module in weights:  # −s · (code − 8): the weight of the group changes its sign
        signs = rng.choice(np.array([-1, 1], np.float16), stored[f"{module}.scales"].shape)
        stored[f"{module}.scales"] *= signs
        weights[module] *= signs.T.repeat(64, axis=1)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out, weights


def decoded(folder: Path) -> dict[str, Any]:
    opened = open_quantized(folder)
    found = {module: opened.load(module) for module in opened.layers}
    assert all((weight.scales > 0).all() for weight in found.values())
    return {module: weight.dequantized() for module, weight in found.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_anywhere_and_back(name: str, foreign: tuple[Path, dict[str, Any]], here: Path) -> None:
    source, weights = foreign
    assert ptq("pack", source, "--format", name, "-o", "there").code == 0
    outcome = ptq("pack", "there", "--format", "gptq", "-o", "back")
    assert outcome.code == 0, outcome.err
    for folder in (source, Path("there"), Path("back")):
        found = decoded(folder)
        assert found.keys() == weights.keys()
        for module, weight in weights.items():
            np.testing.assert_array_equal(found[module], weight)
    before, after = (load_file(path / "model.safetensors") for path in (source, Path("back")))
    for module in weights:
        for part in ("qweight", "qzeros", "scales"):
            np.testing.assert_array_equal(after[f"{module}.{part}"], before[f"{module}.{part}"])
