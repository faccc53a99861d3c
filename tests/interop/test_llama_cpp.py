"""llama.cpp, from the wheel of xllamacpp, on the sample model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_cli.commands import api
from tests.interop import clients
from tests.interop.own_process import in_own_process
from tests.interop.test_runtimes import PLAINLY, mirrored_share

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "xllamacpp"))),
        reason="needs the extra interop",
    ),
]
SAMPLE = Path(__file__).parent.parent.parent / "sample_data"
CASES = [(4, True), (4, False), (5, True), (5, False), (8, True)]


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What llama.cpp and the reference gave for each case."""
    folder, jobs = tmp_path_factory.mktemp("gguf"), []
    for bits, sym in CASES:
        out = folder / f"{bits}-{sym}"
        api.gptq(SAMPLE, bits=bits, group_size=32, sym=sym, format="gguf", output=out, **PLAINLY)
        assert not sym or mirrored_share(out) > 0.25
        jobs.append({"name": out.name, "float": str(SAMPLE), "folder": str(out)})
    jobs = [job | {"format": "gguf", "rounded": False} for job in jobs]
    return {
        client: in_own_process(clients.results, client, jobs)
        for client in ("reference", "llama.cpp")
    }


def centred(values: NDArray[Any]) -> NDArray[Any]:
    """Log-probabilities and logits differ by a number for each position."""
    return np.asarray(values - values.mean(-1, keepdims=True))


@pytest.mark.parametrize(("bits", "sym"), CASES)
def test_logits(bits: int, sym: bool, logits: dict[str, dict[str, Any]]) -> None:
    name = f"{bits}-{sym}"
    assert f"{name}.error" not in logits["llama.cpp"], logits["llama.cpp"][f"{name}.error"]
    ours, theirs = (centred(logits[client][name]) for client in ("reference", "llama.cpp"))
    error = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
    print(f"{name}: {error:.2e}, at most {np.abs(theirs - ours).max():.2e}")
    assert error < 3e-2  # it rounds inputs to 8 bits
    assert logits["llama.cpp"][f"{name}.generated"].size
