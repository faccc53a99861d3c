"""A folder that ptq smoothquant --bits 16 wrote, loaded by transformers: the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import SAMPLE, write_model
from tests.methods.rescaled import rescaled_sample

pytestmark = pytest.mark.interop


def logits(folder: Path) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.load(SAMPLE / "eval_tokens.npy")[:2, :64].astype(np.int64)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_logits_before_and_after(tmp_path, dtype, close):
    folder = rescaled_sample(tmp_path / "model")
    if dtype == "float32":
        read = open_checkpoint(folder)
        wide = {name: read.read(name).astype(np.float32) for name in read.tensors}
        write_model(folder / "model.safetensors", wide, {"format": "pt"})
    report = ptq_cli.smoothquant(folder, bits=16, activation_scheme="none", output=tmp_path / "out")
    assert sum(site["fed_by"] is not None for site in report.sites) == 16
    before, after = logits(folder), logits(tmp_path / "out")
    assert not np.array_equal(before, after)
    assert np.linalg.norm(after - before) < close * np.linalg.norm(before)
