"""FP8, NVFP4, MXFP4, MXFP8 and W4AFP8, written by `ptq rtn` and loaded by their clients: no key is
missing, and logits are those of the twin with our decoded weights, inputs rounded alike."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import ROOT, ptq
from tests.interop.compare import compare_all
from tests.interop.own_process import in_own_process
from tests.interop.test_runtimes import make_qwen
from tests.interop.tiny_models import write_models

NEEDED = ("torch", "transformers", "compressed_tensors", "accelerate", "mlx_lm")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="needs the extra interop"),
]

CT, FP8, MLX = "compressed-tensors", "fp8", "mlx"
SAMPLE, QWEN, HALF, MOE, MIXTRAL = "llama", "qwen2", "qwen2 in float16", "qwen3_moe", "mixtral"
RULES = {  # of layers that another scheme is for
    "NVFP4A16 and FP8_DYNAMIC": ("NVFP4A16", "self_attn", "FP8_DYNAMIC"),
    "MXFP4A16 and FP8_DYNAMIC": ("MXFP4A16", "self_attn", "FP8_DYNAMIC"),
}
STATIC = ("FP8", "NVFP4")  # whose inputs are calibrated
# Relative error of the logits, in the model's dtype with transformers, in float32 with MLX.
TOLERANCES = {"transformers": 0.0, "mlx": 1e-5}


@dataclass(frozen=True)
class Case:
    client: str
    format: str
    model: str
    scheme: str

    @property
    def name(self) -> str:
        return "-".join([self.format, self.model, self.scheme]).replace(" ", "_")


CASES = [
    *(
        Case("transformers", CT, SAMPLE, scheme)
        for scheme in (
            "FP8_DYNAMIC", "FP8", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8",
            "MXFP8A16", "W4AFP8", "NVFP4A16 and FP8_DYNAMIC",
        )
    ),
    *(
        Case("transformers", CT, QWEN, scheme)
        for scheme in ("FP8_DYNAMIC", "FP8", "NVFP4", "MXFP4", "MXFP8")
    ),
    *(
        Case("transformers", CT, HALF, scheme)
        for scheme in ("FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16", "W4AFP8")
    ),
    *(
        Case("transformers", CT, MOE, scheme)
        for scheme in ("FP8_DYNAMIC", "MXFP4A16", "MXFP4A16 and FP8_DYNAMIC")
    ),
    *(Case("transformers", FP8, SAMPLE, scheme) for scheme in ("FP8", "FP8_BLOCK")),
    *(Case("transformers", FP8, model, "FP8") for model in (QWEN, MOE)),
    Case("transformers", FP8, HALF, "FP8_BLOCK"),
    *(
        Case("mlx", MLX, model, scheme)
        for model in (SAMPLE, QWEN)
        for scheme in ("NVFP4A16", "MXFP4A16", "MXFP8A16")
    ),
    Case("mlx", MLX, MIXTRAL, "MXFP4A16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("float")
    write_models(folder, [QWEN, MOE, MIXTRAL])
    make_qwen(folder / "half")
    tiny = {name: folder / name for name in (QWEN, MOE, MIXTRAL)}
    return {SAMPLE: ROOT / "sample_data", HALF: folder / "half", **tiny}


def quantize(case: Case, model: Path, out: Path) -> None:
    options: list[object] = ["--format", case.format, "--no-mse"]
    scheme, match, other = RULES.get(case.scheme, (case.scheme, "", ""))
    if case.scheme in STATIC:
        tokens = out.parent / "tokens.npy"  # that every model has
        np.save(tokens, np.random.default_rng(0).integers(3, 240, (4, 64)))
        options += ["--tokens", tokens]
    if (case.model, case.scheme) == (HALF, "NVFP4A16"):  # exact in bfloat16, which it is made of
        options += ["--global-scale", "power-of-two"]
    if match:
        recipe = out.with_suffix(".toml")
        recipe.write_text(f'[[layers]]\nmatch = "{match}"\nscheme = "{other}"\n')
        options += ["--config", recipe]
    outcome = ptq("rtn", model, "-o", out, "--scheme", scheme, *options)
    assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def results(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What each client made of all of its folders, in one process."""
    folder, found = tmp_path_factory.mktemp("folders"), {}
    for client in ("transformers", "mlx"):
        jobs = []
        for case in (own for own in CASES if own.client == client):
            out = folder / case.name
            quantize(case, models[case.model], out)
            job = {"name": case.name, "client": client, "folder": str(out)}
            job["float"] = str(models[case.model])
            if case.format != CT:
                job["inputs"] = "float"
            jobs.append(job)
        found |= in_own_process(compare_all, jobs)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits(case: Case, results: dict[str, dict[str, Any]]) -> None:
    result = results[case.name]
    assert "raised" not in result, result
    assert (result["missing"], result["unexpected"]) == ([], [])
    print(f"{case.name}: {result['error']:.2e}")
    assert result["error"] <= TOLERANCES[case.client]
