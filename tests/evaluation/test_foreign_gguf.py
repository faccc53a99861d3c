"""GGUF files that llama.cpp made: measured against the float model, K-quants included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq
from tests.formats.cases import golden
from tests.storage.gguf_files import INNER, VOCAB, tensors, write_gguf_file

pytest.importorskip("gguf")

TYPES = {"token_embd": "Q6_K", "blk.0.ffn_up": "Q4_K", "blk.0.ffn_gate": "IQ4_XS"}
MODULES = {
    "token_embd": "model.embed_tokens", "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
}  # fmt: skip


def vector(kind: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """ggml's own blocks of some rows of 512 columns, and the values that they decode to."""
    _, stored = golden(f"ggml_{kind.lower()}")
    count = -(-rows // len(stored["packed"]))
    packed, values = (np.concatenate([stored[name]] * count) for name in ("packed", "dequant"))
    return packed[:rows], values[:rows]


@pytest.fixture
def files(here) -> tuple[Path, Path, dict[str, float]]:
    """The float model, a file of it by ggml, and the error of what is quantized in that."""
    floats, packed, errors = tensors(), {}, {}
    for name, kind in TYPES.items():
        blocks, own = vector(kind, VOCAB if name == "token_embd" else INNER)
        packed[f"{name}.weight"] = (kind, blocks)
        noise = np.random.default_rng(len(name)).normal(size=own.shape) * np.abs(own).mean() / 50
        floats[f"{name}.weight"] = wide = (own + noise).astype(np.float32)
        errors[name] = float(np.square(own - wide).sum() / np.square(wide).sum())
    original = write_gguf_file(Path("float.gguf"), floats)
    return original, write_gguf_file(Path("theirs.gguf"), floats, packed), errors


def test_errors_are_those_of_ggmls_own_values(files):
    original, theirs, errors = files
    outcome = ptq("eval", original, theirs, "--json")
    assert outcome.code == 0, outcome.err
    rows = {row["module"]: row for row in outcome.document["layers"]}
    assert rows.keys() == set(MODULES.values())
    for name, kind in TYPES.items():
        row = rows[MODULES[name]]
        assert row["type"] == kind
        assert row["rel_err"] == pytest.approx(errors[name], rel=1e-4)
    assert "differ from the original" not in outcome.err
    assert outcome.document["totals"]["left_alone"] == len(tensors()) - len(rows)


def test_predictions_are_of_the_values_in_the_file(files):
    original, theirs, _ = files
    np.save("tokens.npy", np.arange(24, dtype=np.int32).reshape(2, 12) % VOCAB)
    outcome = ptq("eval", original, theirs, "--tokens", "tokens.npy", "--json")
    assert outcome.code == 0, outcome.err
    quality = outcome.document["quality"]
    assert quality["tokens"] == 22
    assert quality["kl"]["quantized"]["mean"] > 0
    decoded = ptq("dequantize", theirs, "-o", "decoded", "--dtype", "float32")
    assert decoded.code == 0, decoded.err
    same = ptq("eval", "decoded", theirs, "--tokens", "tokens.npy", "--json").document["quality"]
    assert same["kl"]["quantized"]["mean"] == pytest.approx(0, abs=1e-9)
    assert same["perplexity"]["original"] == pytest.approx(quality["perplexity"]["quantized"])


def test_predictions_that_are_not_finite_are_an_error(files):
    original, _, _ = files
    floats, packed = tensors(), vector("Q6_K", VOCAB)[0]
    floats["output_norm.weight"][3] = np.nan
    broken = write_gguf_file(Path("broken.gguf"), floats, {"token_embd.weight": ("Q6_K", packed)})
    np.save("tokens.npy", np.arange(24, dtype=np.int32).reshape(2, 12) % VOCAB)
    outcome = ptq("eval", original, broken, "--tokens", "tokens.npy")
    assert outcome.code == 4
    assert "error: what the quantized model predicts is not finite" in outcome.err
