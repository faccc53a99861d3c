"""ptq smoothquant and ptq awq through every family's folding rule: the smoothed block computes what
the block did, stated in plain NumPy (tests/models/blocks.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import write_model

sys.path.insert(0, str(Path(__file__).parent))
from tests.models.blocks import FAMILIES, HIDDEN, block, config, tensors

KV_HEADS = {family: 2 for family in FAMILIES if family not in ("opt", "gpt2", "bloom")}


@pytest.fixture
def folder(tmp_path, request, monkeypatch):
    """A random model of a family, float32, its config and the activations of its linears."""
    monkeypatch.chdir(tmp_path)
    family = request.param
    rng = np.random.default_rng(11)
    kv = KV_HEADS.get(family, 4)
    model = {n: a.astype(np.float32) for n, a in tensors(family, rng, kv).items()}
    (tmp_path / "activations").mkdir()
    tokens = rng.standard_normal((200, HIDDEN)).astype(np.float32)
    tokens[:, 3] *= 30  # a loud channel
    prefix = next(name for name in model if ".0." in name).split(".0.")[0] + ".0."
    inner = {name.removeprefix(prefix): a for name, a in model.items() if name.startswith(prefix)}
    for name, inputs in block(family, inner, tokens)[1].items():
        np.save(f"activations/{prefix}{name}.npy", inputs.astype(np.float32))
    Path("config.json").write_text(json.dumps(config(family, kv)))
    write_model(tmp_path / "model.safetensors", model)
    return tmp_path, family, prefix, tokens


def outputs(path, family, prefix, tokens):
    checkpoint = open_checkpoint(Path(path))
    inner = {
        name.removeprefix(prefix): checkpoint.read(name).astype(np.float64)
        for name in checkpoint.tensors
        if name.startswith(prefix)
    }
    return block(family, inner, tokens.astype(np.float64))[0]


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_the_smoothed_block_computes_the_same(folder):
    path, *rest = folder
    report = ptq_cli.smoothquant(path, bits=16, alpha=0.5, activation_scheme="none", output="out")
    folded = [site for site in report.sites if site["fed_by"]]
    assert len(folded) == (3 if rest[0] in ("gpt2", "bloom") else 4)
    before, after = outputs(path, *rest), outputs("out", *rest)
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)


@pytest.mark.parametrize("folder", ["gpt2", "bloom", "phi3"], indirect=True)
def test_fused_and_transposed_weights_are_quantized_as_matrices_of_rows(folder):
    """GPT-2 stores [in, out]: a row of the grid is still a row of [out, in]."""
    path = folder[0]
    report = ptq_cli.awq(path, bits=4, group_size=8, compare=False, output="out")
    assert all(row.heldout_rel_err <= row.rtn_heldout_rel_err for row in report.rows)
    original = open_checkpoint(path)
    for row in report.rows:
        assert (
            ptq_cli.load_weight("out", row.module).shape == original.tensors[row.layer].spec.shape
        )
    plain = {row.module: row for row in ptq_cli.evaluate(path, "out").rows}
    for row in report.rows:
        assert plain[row.module].heldout_rel_err == pytest.approx(row.heldout_rel_err, rel=1e-4)
