"""Mixtures that ptq awq and smoothquant wrote, loaded by transformers: no key is missing or left
over, and logits are those of the twin with our weights, behind the same folds."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq
from tests.interop.test_architectures import TOLERANCE, _run

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "compressed_tensors"))),
        reason="needs the extra interop",
    ),
]

# Inputs stay floats: transformers 5.23 cannot load mixtures whose linears have rounded inputs.
COMMANDS = {
    "awq": ("--no-compare",), "smoothquant": ("--activation-scheme", "none"),
}  # fmt: skip


def test_logits_are_the_twin_s(tmp_path: Path) -> None:
    _run("tiny_models", tmp_path, "mixtral", "qwen3_moe")
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(2).integers(3, 250, (16, 64)))
    jobs = []
    for name in ("mixtral", "qwen3_moe"):
        for command, words in COMMANDS.items():
            for bits in (4, 8):
                out = tmp_path / f"{command}-{name}-{bits}"
                told = ("--bits", bits, "--group-size", 32, "--tokens", tokens, "-o", out)
                form = ("--format", "compressed-tensors", "--json")
                outcome = ptq(command, tmp_path / name, *told, *words, *form)
                assert outcome.code == 0, outcome.err
                jobs.append({"name": out.name, "float": str(tmp_path / name), "folder": str(out)})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    _run("compare", tmp_path / "jobs.json", tmp_path / "out.json")
    for name, result in json.loads((tmp_path / "out.json").read_text()).items():
        assert "raised" not in result, (name, result)
        assert (result["missing"], result["unexpected"]) == ([], []), name
        assert result["error"] <= TOLERANCE, name
