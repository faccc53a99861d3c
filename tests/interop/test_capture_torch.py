"""`ptq_cli.capture` of a transformers model, against `ptq calibrate --tokens`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.commands import api
from ptq_cli.errors import InputError
from ptq_cli.storage.tokens import TokenSettings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
SAMPLE = Path(__file__).parents[2] / "sample_data"


def test_capture_equals_calibrate_with_tokens(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    ids = np.load(SAMPLE / "calibration_tokens.npy")[:12, :64].astype(np.int64)
    np.save(tmp_path / "ids.npy", ids)
    with ptq_cli.capture(model, SAMPLE, tmp_path / "torch.safetensors"):
        for start in range(0, 12, 5):
            model(torch.from_numpy(ids[start : start + 5]))
    tokens = TokenSettings(tmp_path / "ids.npy")
    api.calibrate(SAMPLE, output=tmp_path / "ours.safetensors", tokens=tokens)
    theirs, ours = (open_calibration(tmp_path / f"{n}.safetensors") for n in ("torch", "ours"))
    assert set(theirs.sites) == set(ours.sites)
    assert theirs.model == ours.model
    for site in ours.sites:
        a, b = theirs.load(site), ours.load(site)
        assert (a.linears, a.n_tokens) == (b.linears, b.n_tokens)
        np.testing.assert_allclose(a.hessian, b.hessian, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(a.heldout, b.heldout, rtol=1e-3, atol=1e-3)
    report = ptq_cli.gptq(
        SAMPLE, calibration=tmp_path / "torch.safetensors", output=tmp_path / "out"
    )
    assert report.totals["calibrated"]


def test_a_mask_hides_padding(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    ids = torch.arange(24).reshape(2, 12)
    with ptq_cli.capture(model, SAMPLE, tmp_path / "out.safetensors") as seen:
        seen.mask = np.array([[1] * 12, [1] * 5 + [0] * 7])
        model(ids, attention_mask=torch.from_numpy(seen.mask))
    sites = open_calibration(tmp_path / "out.safetensors").content["sites"]
    assert {entry["n_seen"] for entry in sites.values()} == {17}


def test_another_model_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="no module"),
        ptq_cli.capture(torch.nn.Linear(2, 2), SAMPLE),
    ):
        pass
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE)
    with (
        pytest.raises(InputError, match="was called"),
        ptq_cli.capture(model, SAMPLE, tmp_path / "out.safetensors"),
    ):
        pass
