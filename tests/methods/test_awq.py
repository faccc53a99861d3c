"""ptq awq on the sample model: four methods compared on every layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.methods.awq import METHOD, AwqSettings
from ptq_cli.numerics.rounding import round_to_nearest
from tests.builders import half_sample, ptq, tree
from tests.cli.conftest import check_report  # noqa: F401

SLOW = [  # every pair of two settings
    {"bits": bits, "group_size": size, "sym": sym, "then": then}
    for bits, size, sym, then in (
        (3, -1, True, "awq"), (3, 32, False, "gptq"), (4, -1, False, "gptq"),
        (4, 32, True, "awq"), (8, -1, False, "awq"), (8, 32, True, "gptq"),
    )
]  # fmt: skip
GRIDS = [
    {"bits": 4, "sym": False, "then": "awq"},
    *(pytest.param(grid, marks=pytest.mark.slow) for grid in SLOW),
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    return half_sample(tmp_path_factory.mktemp("plain") / "sample_data", blocks=1)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_layer_ends_above_round_to_nearest_on_heldout_inputs(sample, grid):
    report = ptq_cli.awq(sample, compare=False, output="out", **grid)
    seen = {row.module: row for row in ptq_cli.evaluate(sample, "out").rows}
    for row in report.rows:
        assert row.heldout_rel_err <= row.rtn_heldout_rel_err
        again = seen[row.module]
        assert again.heldout_rel_err <= again.rtn_heldout_rel_err * (1 + 1e-5)
        assert row.heldout_rel_err == pytest.approx(again.heldout_rel_err, rel=1e-5)


def test_the_baseline_is_rtn_of_the_weights_as_they_were(sample):
    awq = {row.module: row for row in ptq_cli.awq(sample, compare=False, output="a").rows}
    for row in ptq_cli.rtn(sample, mse=False, output="b").rows:
        assert awq[row.module].rtn_heldout_rel_err == pytest.approx(row.heldout_rel_err, rel=1e-6)


def test_the_report_names_the_best_of_four_on_every_layer(sample, check_report):  # noqa: F811
    outcome = ptq("awq", sample, "--json", "-o", "out")
    document = check_report(outcome.document)
    folded = {m for site in document["sites"] if site["fed_by"] for m in site["linears"]}
    assert folded
    folded |= {str(site["fed_by"]).removesuffix(".weight") for site in document["sites"]}
    for row in document["layers"]:
        compared = row["compared"]
        assert set(compared) == {"rtn", "awq", "gptq", "awq+gptq"}
        assert row["best"] == min(compared, key=compared.get)
        assert compared["rtn"] == row["rtn_heldout_rel_err"]
        assert compared["awq"] == pytest.approx(row["heldout_rel_err"], rel=1e-5)
        if row["module"] not in folded:
            assert compared["gptq"] == compared["awq+gptq"]


@pytest.mark.slow
def test_gptq_after_awq_is_written_and_named(sample):
    report = ptq_cli.awq(sample, then="gptq", output="out")
    folded = {m for site in report.sites if site["fed_by"] for m in site["linears"]}
    for row in report.rows:
        expected = "awq+gptq" if row.module in folded else "gptq"
        assert row.method in (expected, "rtn", "awq+rtn")
        assert row.heldout_rel_err == pytest.approx(row.compared["awq+gptq"], rel=1e-5)


def test_what_makes_no_sense_is_refused_in_the_plan(sample):
    outcome = ptq("awq", sample, "--group-size", 0)
    assert outcome.code == 1
    assert "--no-clip" in outcome.err
    assert ptq("awq", sample, "--group-size", 0, "--no-clip", "--no-compare").code == 0
    outcome = ptq("awq", sample, "--weight", "fisher")
    assert outcome.code == 1
    assert "Fisher" in outcome.err


@pytest.mark.slow
def test_clip_and_scales_are_both_worth_their_while(sample):
    def mean(**options):
        rows = ptq_cli.awq(sample, compare=False, output="out", force=True, **options).rows
        return sum(row.heldout_rel_err for row in rows)

    whole = mean()
    assert whole < mean(n_grid=1)  # ratio 0 alone: clip only
    assert whole < mean(clip=False)


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(sample):
    for name in ("a", "b"):
        ptq_cli.awq(sample, compare=False, output=name)
    assert tree(Path("a")) == tree(Path("b"))


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"])
def test_rounding_loses_no_more_than_the_search_of_rtn(kind):
    rng, grid = np.random.default_rng(4), TYPES[kind].grid
    weight = rng.standard_t(4, (24, 256)).astype(np.float32)
    root = np.diag(rng.lognormal(0, 1, 256)).astype(np.float32)
    energy = np.square(root).sum(0)

    def loss(rounded):
        return float((np.square(rounded.dequantized() - weight) * energy).sum())

    ours = METHOD.apply(weight, root, grid, AwqSettings()).weight
    assert loss(ours) <= loss(round_to_nearest(weight, grid, energy)) * (1 + 1e-6)
