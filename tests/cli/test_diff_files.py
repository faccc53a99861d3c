"""`ptq diff` of two GGUF files, and `ptq inspect` of what is in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq
from tests.formats.cases import golden
from tests.storage.gguf_files import INNER, WIDTH, tensors, write_gguf_file

pytest.importorskip("gguf")

UP, DOWN, GATE = (f"blk.0.ffn_{name}.weight" for name in ("up", "down", "gate"))


def vector(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """ggml's own blocks [INNER, bytes], and the values [INNER, WIDTH] that they decode to."""
    _, stored = golden(f"ggml_{kind.lower()}")
    count = INNER // len(stored["packed"])
    return tuple(np.concatenate([stored[name]] * count) for name in ("packed", "dequant"))


@pytest.fixture
def files(here) -> tuple[Path, Path]:
    """A float model, and one made of it with ffn_up in Q4_K and ffn_gate in Q6_K."""
    floats = tensors()
    packed = {name: (kind, vector(kind)[0]) for name, kind in ((UP, "Q4_K"), (GATE, "Q6_K"))}
    first = write_gguf_file(Path("float.gguf"), floats)
    return first, write_gguf_file(Path("theirs.gguf"), floats, packed, context_length=128)


def test_types_and_distances_of_two_files(files):
    outcome = ptq("diff", *files, "--json")
    assert outcome.code == 0, outcome.err
    found = {entry["tensor"]: entry for entry in outcome.document["tensors"]}
    assert found.keys() == {UP, GATE}
    for name, kind in ((UP, "Q4_K"), (GATE, "Q6_K")):
        entry, source = found[name], tensors()[name].astype(np.float64)
        assert (entry["before"]["type"], entry["after"]["type"]) == ("F32", kind)
        expected = np.square(vector(kind)[1] - source).sum() / np.square(source).sum()
        assert entry["rel_diff"] == pytest.approx(expected, rel=1e-6)
    assert outcome.document["keys"] == {"llama.context_length": {"before": "64", "after": "128"}}
    shown = ptq("diff", *files).out
    assert "llama.context_length: 64 -> 128" in shown
    assert "after: no mix is stated, 11 F32" not in shown
    assert "1 Q4_K" in shown


def test_equal_files_have_no_difference(files):
    outcome = ptq("diff", files[1], files[1])
    assert (outcome.code, outcome.out) == (0, "no difference\n")


def test_files_of_other_models_are_refused(files):
    other = write_gguf_file(Path("other.gguf"), {UP: np.ones((4, WIDTH), np.float32)})
    outcome = ptq("diff", files[0], other)
    assert outcome.code == 1
    assert f"are not of one model: tensor {UP!r} is [32, 512] and [4, 512]" in outcome.errors[0]
    Path("report.json").write_text("{}")
    outcome = ptq("diff", files[0], "report.json")
    assert "report.json is no GGUF file, and the other one is" in outcome.errors[0]


# ---- inspect ----


def mix(path: Path, *options: object) -> dict:
    outcome = ptq("inspect", path, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.document["gguf"]


def test_a_file_that_states_no_mix_is_near_one(files):
    found = mix(files[1])
    assert found["types"]["Q4_K"] == {"tensors": 1, "bytes": INNER * WIDTH * 144 // 256}
    assert (found["stated"], found["file_type"], found["mixes"]) == (None, None, [])
    assert found["differing"][DOWN][0] == "F32"
    assert mix(files[0])["types"].keys() == {"F32"}
    text = ptq("inspect", files[1]).out
    assert "general.file_type is missing" in text
    assert "tensors have other types than in" in text


def test_a_mix_is_told_by_its_types(here):
    from tests.cli.tiny_folders import llama

    model = llama(Path("m"), seed=2)
    assert ptq("pack", model, "--scheme", "Q4_K_M", "-o", "whole").code == 0
    found = mix(Path("whole"))
    assert (found["stated"], found["differing"]) == ("Q4_K_M", {})
    assert "Q4_K_M" in found["mixes"]
    total = sum(own["bytes"] for own in found["types"].values())
    text = ptq("inspect", "whole").out
    assert "general.file_type says Q4_K_M, and the types are those of it" in text
    weights = 2 * 96 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert found["bits_per_weight"] == pytest.approx(8 * total / weights)
    changed = ("--tensor-type", "blk.1.attn_q=Q8_0", "--output-tensor-type", "F16")
    assert ptq("pack", model, "--scheme", "Q4_K_M", *changed, "-o", "changed").code == 0
    found = mix(Path("changed"))
    assert found["differing"] == {
        "blk.1.attn_q.weight": ["Q8_0", "Q5_0"], "output.weight": ["F16", "Q8_0"],
    }  # fmt: skip
    changed = ("--scheme", "Q4_0", "--tensor-type", ".=Q8_0")
    assert ptq("pack", model, *changed, "-o", "other").code == 0
    found = mix(Path("other"))
    assert (found["stated"], found["nearest"], found["differing"]) == ("Q4_0", "Q8_0", {})
    text = ptq("inspect", "other").out
    assert "general.file_type says Q4_0, and the types are those of Q8_0" in text
    text = ptq("inspect", "changed").out
    assert "general.file_type says Q4_K_M; 2 tensors have other types than in Q4_K_M:" in text
    assert "Q8_0 instead of Q5_0 (1): blk.1.attn_q" in text
