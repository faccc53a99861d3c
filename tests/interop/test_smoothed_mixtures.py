"""Mixtures that ptq awq and smoothquant wrote, loaded by transformers: no key is missing or left
over, and logits are those of the twin with our weights, behind the same folds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq
from tests.interop.compare import compare
from tests.interop.test_architectures import TOLERANCE
from tests.interop.tiny_models import write_models

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "compressed_tensors"))),
        reason="needs the extra interop",
    ),
]

# Inputs stay floats: transformers 5.23 cannot load mixtures whose linears have rounded inputs.
COMMANDS = {
    "awq": ("--no-compare",), "smoothquant": ("--activation-scheme", "none"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    write_models(folder, ["mixtral", "qwen3_moe"])
    np.save(folder / "tokens.npy", np.random.default_rng(2).integers(3, 250, (16, 64)))
    return folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_logits_are_the_twin_s(
    tmp_path: Path, models: Path, name: str, command: str, bits: int
) -> None:
    out = tmp_path / "out"
    told = ("--bits", bits, "--group-size", 32, "--tokens", models / "tokens.npy", "-o", out)
    form = ("--format", "compressed-tensors", "--json")
    outcome = ptq(command, models / name, *told, *COMMANDS[command], *form)
    assert outcome.code == 0, outcome.err
    result = compare({"name": out.name, "float": str(models / name), "folder": str(out)})
    assert (result["missing"], result["unexpected"]) == ([], [])
    assert result["error"] <= TOLERANCE
