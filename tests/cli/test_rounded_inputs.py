"""Where inputs are rounded too (W8A8), what is told is told of outputs with rounded inputs."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from tests.builders import SAMPLE, ptq, small_activations
from tests.cli.test_junit import read


def rounded(inputs, scale=None):
    """Integer inputs by the formula: per token, or with one scale."""
    steps = np.abs(inputs).max(axis=1, keepdims=True) / 127 if scale is None else scale
    return np.clip(np.rint(inputs / steps), -127, 127) * steps


def error(inputs, weight, dequantized, scale=None):
    exact = inputs @ weight.T
    lost = exact - rounded(inputs, scale) @ dequantized.T
    return (lost**2).sum() / (exact**2).sum()


def heldout(one_block, site):
    inputs = np.load(one_block / "activations" / f"{site}.npy").astype(np.float64)
    return inputs[7::8][:512], np.delete(inputs, np.arange(7, len(inputs), 8), axis=0)


def plain_rounding(weight):
    steps = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
    return np.clip(np.rint(weight / steps), -127, 127) * steps


@pytest.mark.parametrize("scheme", ["dynamic-token", "static"])
def test_rows_are_those_of_the_formula(scheme, one_block):
    report = ptq_cli.smoothquant(one_block, activation_scheme=scheme, output="out")
    weights = ptq_cli.storage.checkpoint.open_checkpoint(one_block)
    module = "model.layers.0.self_attn.q_proj"
    held, seen = heldout(one_block, module)
    weight = weights.read(f"{module}.weight").astype(np.float64)
    scale = None if scheme != "static" else np.abs(seen).max() / 127
    row = next(row for row in report.rows if row.module == module)
    assert row.input_bits == 8
    wanted = error(held, weight, plain_rounding(weight), scale)
    assert row.rtn_heldout_rel_err == pytest.approx(wanted, rel=1e-3)
    site = next(site for site in report.sites if site["site"] == module)
    if site["fed_by"] is None:
        ours = error(held, weight, ptq_cli.load_weight("out", module).astype(np.float64), scale)
        assert row.heldout_rel_err == pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize(
    "words", [(), ("--activation-scheme", "static"), ("--alpha", "auto", "--then", "gptq")]
)
def test_smoothing_that_is_kept_is_a_gain(words, one_block):
    outcome = ptq("smoothquant", one_block, *words, "-o", "out", "--min-gain", "1", "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["totals"]["gain_vs_rtn"] > 1
    assert document["totals"]["rounded_inputs"]
    for row in document["layers"]:
        assert row["weight_rel_err"] < row["heldout_rel_err"]
    of_module = {row["module"]: row for row in document["layers"]}
    for site in document["sites"]:  # what they were chosen by is what is told of them
        if site["fed_by"] and site["site"].endswith(("gate_proj", "q_proj")):
            own = [of_module[module]["heldout_rel_err"] for module in site["linears"]]
            assert sum(own) / len(own) == pytest.approx(site["error"], rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["rtn", "gptq", "smoothquant"])
def test_an_evaluation_measures_the_same(command, one_block):
    scheme = () if command == "smoothquant" else ("--scheme", "W8A8")
    made = ptq(command, one_block, *scheme, "-o", "out", "--json").document
    found = ptq("eval", one_block, "out", "--json", "--junit", "j.xml", "--html", "p.html").document
    for ours, theirs in zip(made["layers"], sorted(found["layers"], key=order(made)), strict=True):
        for key in ("rel_err", "heldout_rel_err", "rtn_heldout_rel_err", "weight_rel_err"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key
    assert found["totals"]["rounded_inputs"]
    row = found["layers"][0]
    case = next(c for c in read("j.xml").findall("testcase") if c.get("name") == row["module"])
    assert f"weight_rel_err {row['weight_rel_err']:.6g}" in case.find("system-out").text
    page = Path("p.html").read_text()
    assert "rounded as they run" in page
    assert "Weight only" in page


def order(document):
    places = [row["module"] for row in document["layers"]]
    return lambda row: places.index(row["module"])


def test_in_sequence(one_block):
    tokens = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 4, "--seq-len", 64)
    document = ptq("smoothquant", one_block, *tokens, "-o", "out", "--json").document
    assert document["totals"]["rounded_inputs"]
    assert all(row["weight_rel_err"] is not None for row in document["layers"])
    assert document["totals"]["gain_vs_rtn"] > 0.99


def test_without_inputs_it_is_said(job):
    outcome = ptq("pack", job, "--scheme", "W8A8", "-o", "out", "--report", "r.csv")
    assert "rel err on the weights (inputs are rounded too, and there are none to" in outcome.out
    totals = json.loads(Path("out/report.json").read_text())["totals"]
    assert totals["rounded_inputs"] is False
    row = next(csv.DictReader(Path("r.csv").read_text().splitlines()))
    assert (row["input_bits"], row["weight_rel_err"]) == ("8", "")
    small_activations(Path("acts"))
    measured = ptq("eval", job, "out", "--activations", "acts")
    assert "rel err on held-out inputs, rounded as they run" in measured.out
    assert re.search(r"gain +weight only", measured.out)
    ptq("rtn", job, "--scheme", "W8A8", "--activations", "acts", "-o", "known")
    compared = ptq("diff", "out", "known", "--tolerance", "1e9")
    assert "only the errors after are those of outputs with rounded inputs" in compared.out


def test_a_report_of_float_inputs_has_no_such_column(job):
    small_activations(Path("acts"))
    outcome = ptq("rtn", job, "--activations", "acts", "-o", "out", "--json")
    assert not {"weight_rel_err", "input_bits"} & set(outcome.document["layers"][0])
    assert "rounded_inputs" not in outcome.document["totals"]
    assert "weight only" not in ptq("eval", job, "out", "--activations", "acts").out


# ---- eval on tokens alone ----


@pytest.fixture(scope="module")
def plain(sample, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(sample, folder, ignore=shutil.ignore_patterns("activations"))
    return folder


def test_layers_are_measured_on_the_tokens_that_eval_is_given(plain):
    tokens = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 8, "--seq-len", 64)
    assert ptq("gptq", plain, *tokens, "--drift", 0, "-o", "out").code == 0
    other = ("--tokens", SAMPLE / "eval_tokens.npy", "--nsamples", 8, "--seq-len", 64)
    outcome = ptq("eval", plain, "out", *other, "--json")
    document = outcome.document
    assert document["totals"]["calibrated"]
    assert document["totals"]["gain_vs_rtn"] > 1.2
    assert sum("better than rtn" in line for line in outcome.progress) > 10
    assert not any("no calibration" in line for line in outcome.warnings)
    ptq("calibrate", plain, *other, "-o", "stats.safetensors")
    same = ptq("eval", plain, "out", "--calibration", "stats.safetensors", "--json").document
    for row, twin in zip(document["layers"], same["layers"], strict=True):
        assert row["heldout_rel_err"] == pytest.approx(twin["heldout_rel_err"], rel=1e-5)
        assert row["rel_err"] == pytest.approx(twin["rel_err"], rel=1e-4)
    integer = ptq("eval", plain, "out", *other, "--activation-scheme", "dynamic-token", "--json")
    assert all(row["activations"] for row in integer.document["layers"])
    assert ptq("eval", plain, "out", *other, "--dry-run").code == 0


def test_weights_alone_are_no_verdict(plain):
    tokens = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 32, "--seq-len", 64)
    ptq("gptq", plain, *tokens, "--drift", 0, "-o", "out")
    outcome = ptq("eval", plain, "out")
    assert not any("worse" in line for line in outcome.progress)
    assert all("(of the weights)" in line for line in outcome.progress)
