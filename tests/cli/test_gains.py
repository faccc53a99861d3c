"""What GPTQ's errors are beside plain rounding's; without extras it is the paper's algorithm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from tests import oracles
from tests.builders import ptq

# Grid, the least gain over round-to-nearest that the defaults must reach on the sample model, and
# the greatest mean error: mirrored groups help rounding to nearest more than they help GPTQ.
FLOORS = [
    (4, "--sym", 1.93, 0.0028),
    pytest.param(4, "--asym", 1.8, 0.0028, marks=pytest.mark.slow),
    pytest.param(3, "--sym", 2.05, 0.0104, marks=pytest.mark.slow),
    (3, "--asym", 2.12, 0.0104),
    pytest.param(2, "--sym", 2.15, 0.0425, marks=pytest.mark.slow),
    (2, "--asym", 2.8, 0.0425),
]


@pytest.fixture(scope="module")
def sample(whole_sample):
    return whole_sample


@pytest.mark.parametrize(("bits", "symmetry", "floor", "most"), FLOORS)
def test_gain_over_round_to_nearest_on_inputs_not_calibrated_on(
    bits, symmetry, floor, most, sample
):
    outcome = ptq("gptq", sample, "--bits", bits, symmetry, "--json", "-o", "out")
    document = outcome.document
    assert document["totals"]["heldout"] is True
    assert document["totals"]["gain_vs_rtn"] >= floor
    assert document["totals"]["mean_rel_err"] <= most
    assert document["totals"]["fallbacks"] == 0
    for row in document["layers"]:
        assert row["heldout_rel_err"] <= row["rtn_heldout_rel_err"], row["layer"]


@pytest.mark.parametrize(
    "options",
    [["--asym"], ["--narrow-range"], ["--scheme", "W8A8"]],
    ids=["asymmetric", "narrow range", "integer inputs"],
)
def test_no_other_groups_are_mirrored(options, one_block):
    assert ptq("pack", one_block, *options, "-o", "out").code == 0
    folder = open_quantized(Path("out"))
    assert not any(layer.grid.mirrored for layer in folder.layers.values())
    if "--asym" not in options:
        for module, layer in folder.layers.items():
            assert (folder.load(module).zeros == layer.grid.mid_code).all()


def test_without_extras_it_is_the_papers_algorithm(sample):
    options = ["--refine", "0", "--sweeps", "0", "--no-mse", "--act-order", "none", "--asym"]
    assert ptq("gptq", sample, *options, "-o", "out").code == 0
    assert ptq("calibrate", sample, "-o", "stats.safetensors").code == 0
    stats, model = open_checkpoint(Path("stats.safetensors")), open_checkpoint(sample)
    written = open_quantized(Path("out"))
    sites = json.loads(stats.metadata["ptq"])["sites"]
    site_of = {linear: site for site, entry in sites.items() for linear in entry["linears"]}
    assert len(written.layers) == 28
    grid = Grid(4, 128, sym=False)
    for module, layer in written.layers.items():
        assert layer.method == "gptq"
        if ".0." not in module and ".3." not in module:
            continue  # the twin is slow
        hessian = stats.read(f"{site_of[module]}.hessian").astype(np.float64)
        weight = model.read(layer.tensor).astype(np.float64)
        twin = oracles.gptq(weight, hessian, grid, damp=0.01)
        rounded = written.load(module)
        assert np.array_equal(rounded.codes, twin.codes), module
        assert np.array_equal(rounded.scales, twin.scales)
        assert np.array_equal(rounded.zeros, twin.zeros)
