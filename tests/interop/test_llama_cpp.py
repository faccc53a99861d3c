"""llama.cpp, where llama-cpp-python is installed: it compiles for long, so CI does without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptq_cli.commands import api
from tests.interop.clients import PROMPT, reference

pytestmark = pytest.mark.interop
llama_cpp = pytest.importorskip("llama_cpp")
SAMPLE = Path(__file__).parent.parent.parent / "sample_data"


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (5, True), (5, False), (8, True)])
def test_logits(tmp_path: Path, bits: int, sym: bool) -> None:
    out = tmp_path / "out"
    api.gptq(SAMPLE, bits=bits, group_size=32, sym=sym, format="gguf", output=out)
    job = {"float": str(SAMPLE), "folder": str(out), "format": "gguf", "rounded": False}
    ours, _ = reference(job)
    model = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    model.eval(PROMPT[0])
    theirs = np.array(model.scores[: len(PROMPT[0])])
    error = np.linalg.norm(theirs - ours[0]) / np.linalg.norm(ours)
    assert error < 3e-2
    assert model.create_completion("def main():", max_tokens=4)["choices"][0]["text"] is not None
