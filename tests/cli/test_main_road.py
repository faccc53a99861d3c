"""calibrate → gptq → eval → pack on the sample model, as a user drives it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.report.report import CSV_COLUMNS
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from tests.builders import OUTPUT, ptq, read_model, tree


@pytest.fixture(scope="module")
def sample(whole_sample):
    return whole_sample


@pytest.fixture(scope="module")
def road(sample, tmp_path_factory):
    """The default run, its output folder and what it said."""
    folder = tmp_path_factory.mktemp("road")
    outcome = ptq("gptq", sample, "--json", "-o", folder / "out", "--report", folder / "r.csv")
    assert outcome.code == 0, outcome.err
    return folder / "out", outcome, folder / "r.csv"


# ---- names and files ----


def test_the_users_own_command_works_with_nothing_else_said(one_block, tmp_path):
    model = one_block / "model.safetensors"
    outcome = ptq("gptq", model, "--bits", 4, "--group-size", 128)
    assert outcome.code == 0
    assert outcome.err == ""
    assert sorted(tree(tmp_path / "model-gptq-w4g128")) == OUTPUT
    report = json.loads((tmp_path / "model-gptq-w4g128" / "report.json").read_text())
    assert report["totals"]["calibrated"] is True
    assert {row["method"] for row in report["layers"]} == {"gptq"}


@pytest.mark.parametrize(
    ("command", "options", "name"),
    [
        ("gptq", [], "model-gptq-w4g128"),
        ("gptq", ["--bits", "3", "--asym"], "model-gptq-w3g128-asym"),
        ("rtn", ["--group-size", "-1"], "model-rtn-w4row"),
        ("pack", ["--bits", "8", "--group-size", "0"], "model-pack-w8tensor"),
        ("pack", ["-b", "2", "-g", "5"], "model-pack-w2g5"),
    ],
)
def test_the_default_output_is_named_after_model_method_and_grid(job, command, options, name):
    source = [] if command == "pack" else ["--activations", "acts"]
    assert ptq(command, job, *options, *source).code == 0
    assert Path(name, "model.safetensors").is_file()


def test_a_model_folders_companions_come_along(road, sample):
    written = tree(road[0])
    for name in ("config.json", "tokenizer.json", "README.md"):
        assert written[name] == (sample / name).read_bytes()
    assert not [name for name in written if name.endswith(".npy")]


def test_calibrate_writes_beside_the_model_and_is_found_there(tmp_path, job):
    assert ptq("calibrate", job, "--activations", "acts").code == 0
    assert (tmp_path / "model.calibration.safetensors").is_file()
    outcome = ptq("gptq", job, "--json", "--require-calibration")
    assert outcome.code == 0
    assert outcome.document["totals"]["calibrated"] is True


def test_nothing_but_the_output_is_left(road):
    assert sorted(entry.name for entry in road[0].parent.iterdir()) == ["out", "r.csv"]


def test_modes_follow_the_umask(road):
    assert {oct(path.stat().st_mode & 0o777) for path in road[0].iterdir()} == {"0o644"}


# ---- what is written ----


def test_symmetric_groups_are_mirrored_where_that_is_better(road, sample):
    """Of every layer some groups have the longer side of the codes above zero, some below."""
    folder = open_quantized(road[0])
    shares = []
    for module, layer in folder.layers.items():
        assert layer.grid.sym
        assert layer.grid.mirrored
        zeros = folder.load(module).zeros
        assert set(zeros.flat) == {7, 8}
        shares.append((zeros == 7).mean())
    assert 0.4 < np.mean(shares) < 0.6
    outcome = ptq("eval", sample, road[0], "--json")
    assert outcome.code == 0
    assert {row["sym"] for row in outcome.document["layers"]} == {True}
    found, stated = outcome.document["totals"], road[1].document["totals"]
    assert found["mean_rel_err"] == pytest.approx(stated["mean_rel_err"], rel=1e-4)
    assert found["gain_vs_rtn"] == pytest.approx(stated["gain_vs_rtn"], rel=1e-4)


def test_the_same_run_gives_the_same_bytes(road, sample):
    """Not even the calibration's road matters: activations on the way, or a statistics file."""
    assert ptq("gptq", sample, "-o", "again").code == 0
    assert tree(Path("again")) == tree(road[0])


def test_untouched_tensors_are_the_models_bytes(road, sample):
    before = read_model(sample / "model.safetensors")
    after = read_model(road[0] / "model.safetensors")
    packed = {name for name in before if name.endswith("_proj.weight")}
    assert {name for name in before if name in after} == set(before) - packed
    for name in set(before) - packed:
        assert after[name] == before[name]


# ---- report ----


def test_report_json_and_the_json_document_agree(road, check_report):
    folder, outcome, _ = road
    stored = check_report(json.loads((folder / "report.json").read_text()))
    printed = check_report(outcome.document)
    assert printed.pop("output") == str(folder)
    for part in (printed["totals"], *printed["layers"]):
        part.pop("seconds")
    assert printed == stored


@pytest.mark.parametrize("command", ["gptq", "rtn", "pack", "eval"])
def test_every_commands_documents_follow_the_schema(command, job, check_report):
    arguments = [job] if command != "eval" else [job, "out"]
    assert ptq("gptq", job, "--activations", "acts", "-o", "out").code == 0
    outcome = ptq(command, *arguments, "--json", "--report", "report.json")
    assert outcome.code == 0
    assert check_report(outcome.document) == check_report(
        json.loads(Path("report.json").read_text())
    )
    assert outcome.document["command"] == command


def test_calibrates_document_is_json_too(job):
    document = ptq("calibrate", job, "--activations", "acts", "--json").document
    assert set(document) == {"output", "warnings", "sites", "seconds"}
    site = document["sites"]["layers.0.q_proj"]
    assert site["linears"] == ["layers.0.q_proj", "layers.0.k_proj"]
    assert site["n_seen"] == 96
    assert site["n_tokens"] == 84
    assert site["static_scale"] == pytest.approx(site["p99"] / 127)


def test_every_linear_of_the_model_has_a_row(road, sample):
    rows = road[1].document["layers"]
    names = [name for name in open_checkpoint(sample).tensors if name.endswith("_proj.weight")]
    assert sorted(row["layer"] for row in rows) == sorted(names)
    assert len(rows) == 28
    assert {row["tokens"] for row in rows} == {896}
    for row in rows:
        assert 4 < row["bits_per_weight"] < 5
        assert row["heldout_rel_err"] is not None


def test_the_csv_has_the_same_numbers(road):
    rows = list(csv.DictReader(road[2].read_text().splitlines()))
    documents = road[1].document["layers"]
    assert list(rows[0]) == list(CSV_COLUMNS)
    for row, document in zip(rows, documents, strict=True):
        assert row["layer"] == document["layer"]
        assert row["shape"] == " ".join(map(str, document["shape"]))
        assert row["sym"] == "true"
        assert float(row["heldout_rel_err"]) == document["heldout_rel_err"]
        assert row["fallback"] == ""


@pytest.mark.parametrize("command", ["calibrate", "gptq", "rtn", "pack", "eval"])
def test_json_is_one_document_on_stdout_and_nothing_else(command, job):
    ptq("pack", job, "-o", "out")
    arguments = [job, "out"] if command == "eval" else [job]
    if command != "pack":
        arguments += ["--activations", "acts"]
    outcome = ptq(command, *arguments, "--json")
    assert outcome.code == 0
    document, end = json.JSONDecoder().raw_decode(outcome.out)
    assert outcome.out[end:] == "\n"
    assert isinstance(document, dict)
    assert outcome.errors == []


def test_totals_count_bytes_of_tensors(road, sample):
    totals = road[1].document["totals"]
    for key, path in (("bytes_before", sample), ("bytes_after", road[0])):
        tensors = read_model(path / "model.safetensors")
        assert totals[key] == sum(len(data) for _, _, data in tensors.values())


# ---- eval ----


def test_eval_measures_what_gptq_reported(road, sample, check_report):
    outcome = ptq("eval", sample, road[0], "--json")
    assert outcome.code == 0
    measured = check_report(outcome.document)["layers"]
    reported = {row["layer"]: row for row in road[1].document["layers"]}
    assert {row["layer"] for row in measured} == set(reported)
    numbers = ("heldout_rel_err", "rtn_heldout_rel_err", "gain_vs_rtn", "max_abs_err")
    on_a_sample = ("loss", "rel_err", "rtn_rel_err")  # in a run; here on all tokens
    for ours in measured:
        theirs = reported[ours["layer"]]
        for key in ("bits", "group_size", "sym", "method", "tokens", "bytes"):
            assert ours[key] == theirs[key]
        for key in numbers:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (ours["layer"], key)
        for key in on_a_sample:
            assert ours[key] == pytest.approx(theirs[key], rel=0.2), (ours["layer"], key)
    totals, theirs = outcome.document["totals"], road[1].document["totals"]
    assert totals["bytes_after"] == theirs["bytes_after"]
    assert totals["gain_vs_rtn"] == pytest.approx(theirs["gain_vs_rtn"])
    assert {entry["reason"] for entry in outcome.document["left_alone"]} == {""}


def test_eval_never_believes_the_report(job):
    ptq("gptq", job, "--activations", "acts", "-o", "out")
    before = ptq("eval", job, "out", "--activations", "acts", "--json").document
    report = json.loads(Path("out/report.json").read_text())
    for row in report["layers"]:
        row["rel_err"] = row["heldout_rel_err"] = 0.0
    Path("out/report.json").write_text(json.dumps(report))
    after = ptq("eval", job, "out", "--activations", "acts", "--json").document
    assert [row["rel_err"] for row in after["layers"]] == [r["rel_err"] for r in before["layers"]]


def test_eval_names_layers_that_are_plain_rounding(job):
    ptq("pack", job, "-o", "out")
    document = ptq("eval", job, "out", "--activations", "acts", "--json").document
    assert {row["fallback"] for row in document["layers"]} == {"codes equal round-to-nearest"}
    assert document["totals"]["gain_vs_rtn"] == 1.0


def test_eval_without_calibration_measures_weights_and_says_so(job):
    ptq("pack", job, "-o", "out")
    outcome = ptq("eval", job, "out", "--json")
    assert outcome.code == 0
    assert outcome.document["totals"]["calibrated"] is False
    assert "no calibration: errors are those of the weights" in outcome.err


def test_eval_shows_worst_layers_first(road, sample):
    lines = ptq("eval", sample, road[0], "--top", 0).out.splitlines()
    gains = [float(line.split()[3]) for line in lines if "_proj" in line]
    assert len(gains) == 28
    assert gains == sorted(gains, reverse=True)


def test_eval_says_where_untouched_tensors_differ(job):
    ptq("pack", job, "-o", "out")
    path = Path("out/model.safetensors")
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(7).tobytes())] ^= 1
    path.write_bytes(content)
    outcome = ptq("eval", job, "out")
    assert outcome.code == 0
    assert any("differ from the original: positions" in line for line in outcome.warnings)


# ---- gates ----


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (["--max-rel-err", "1e-9"], "worst"),
        (["--min-gain", "1e9"], "gain_vs_rtn is"),
        (["--max-fallbacks", "0"], "4 layers"),
    ],
)
@pytest.mark.parametrize("command", ["gptq", "eval"])
def test_a_missed_gate_is_exit_code_3_and_the_output_is_there(command, gate, words, job):
    source = []
    if command == "eval":
        ptq("pack", job, "-o", "out")
    elif gate[0] != "--max-fallbacks":
        source = ["--activations", "acts"]
    arguments = [job, "out"] if command == "eval" else [job, "-o", "out", *source]
    outcome = ptq(command, *arguments, *gate)
    assert outcome.code == 3
    assert len(outcome.errors) == 1
    assert gate[0] in outcome.errors[0]
    assert words in outcome.errors[0]
    assert Path("out/report.json").is_file()


def test_the_gate_names_the_worst_layer_and_its_number(road, sample):
    worst = road[1].document["totals"]
    outcome = ptq("eval", sample, road[0], "--max-rel-err", 1e-6)
    assert outcome.code == 3
    assert worst["worst_layer"] in outcome.errors[0]
    assert f"{worst['worst_rel_err']:.4g}" in outcome.errors[0]
    assert "28 layers" in outcome.errors[0]


def test_gates_that_hold_are_silent(road, sample):
    gates = ["--max-rel-err", "0.01", "--min-gain", "1.9", "--max-fallbacks", "0"]
    outcome = ptq("eval", sample, road[0], *gates)
    assert (outcome.code, outcome.err) == (0, "")
