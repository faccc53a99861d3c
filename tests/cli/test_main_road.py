"""calibrate → gptq → eval → pack on the sample model, as a user drives it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.core.grid import Grid
from ptq_cli.report.report import CSV_COLUMNS
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from tests import oracles
from tests.builders import OUTPUT, half_sample, ptq, read_model, tree

Q_PROJ = "model.layers.0.self_attn.q_proj"

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


# ---- accuracy ----


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


# ---- merged calibrations ----


def halves(one_block, folder, cut):
    for source in (one_block / "activations").iterdir():
        inputs = np.load(source)
        for half, part in (("first", inputs[:cut]), ("second", inputs[cut:])):
            (folder / half).mkdir(exist_ok=True)
            np.save(folder / half / source.name, part)


@pytest.mark.parametrize("cut", [512, 200, 301])
def test_two_halves_merged_equal_the_whole(one_block, tmp_path, cut):
    halves(one_block, tmp_path, cut)
    assert ptq("calibrate", one_block, "-o", "whole.safetensors").code == 0
    for half in ("first", "second"):
        made = ptq("calibrate", one_block, "--activations", half, "-o", f"{half}.safetensors")
        assert made.code == 0
    parts = ["--merge", "first.safetensors", "--merge", "second.safetensors"]
    assert ptq("calibrate", one_block, *parts, "-o", "merged.safetensors").code == 0
    whole, merged = (open_checkpoint(Path(f"{n}.safetensors")) for n in ("whole", "merged"))
    ours, theirs = (json.loads(c.metadata["ptq"])["sites"] for c in (merged, whole))
    assert list(ours) == list(theirs)
    aligned = cut % 8 == 0
    for site, entry in theirs.items():
        hessian = whole.read(f"{site}.hessian")
        off = np.abs(merged.read(f"{site}.hessian") - hessian).max() / np.abs(hessian).max()
        assert off <= (1e-6 if aligned else 0.5)
        assert ours[site]["n_seen"] == entry["n_seen"] == 1024
        if not aligned:  # other tokens are held out, so statistics differ a little
            continue
        assert ours[site]["n_tokens"] == entry["n_tokens"]
        for key in ("min", "max"):
            assert ours[site][key] == entry[key]
        for key in ("mean", "std"):
            assert ours[site][key] == pytest.approx(entry[key], abs=1e-6 * entry["std"])
        assert ours[site]["p99"] == pytest.approx(entry["p99"], rel=2.0**-7)
        for part in ("absmax", "histogram", "heldout"):
            assert np.array_equal(merged.read(f"{site}.{part}"), whole.read(f"{site}.{part}"))
        np.testing.assert_allclose(
            merged.read(f"{site}.absmean"), whole.read(f"{site}.absmean"), rtol=1e-6
        )


def test_the_percentile_is_within_its_bound_of_the_exact_one(one_block):
    document = ptq("calibrate", one_block, "-o", "s.safetensors", "--heldout-every", 0, "--json")
    for site, entry in document.document["sites"].items():
        inputs = np.abs(np.load(one_block / "activations" / f"{site}.npy").astype(np.float64))
        exact = np.sort(inputs.ravel())[int(np.ceil(0.99 * inputs.size)) - 1]
        assert entry["p99"] == pytest.approx(exact, rel=2.0**-8)
        assert entry["n_tokens"] == entry["n_seen"] == 1024


# ---- where calibration comes from ----


def test_calibration_is_found_in_order(tmp_path):
    """The file beside the model, then activations/ beside it, then none, loudly."""
    sample = half_sample(tmp_path / "m", blocks=1)
    assert ptq("calibrate", sample, "--heldout-every", 0).code == 0

    def totals(*options):
        outcome = ptq("gptq", sample, "--json", "--force", "-o", "out", *options)
        assert outcome.code == 0
        return outcome.document, outcome.warnings

    assert totals()[0]["layers"][0]["tokens"] == 1024  # the file: nothing was held out
    (sample / "model.calibration.safetensors").unlink()
    assert totals()[0]["layers"][0]["tokens"] == 896  # the folder
    (sample / "activations").rename(tmp_path / "elsewhere")
    document, warnings = totals()
    assert len(warnings) == 1
    assert "NO CALIBRATION" in warnings[0]
    assert document["totals"]["calibrated"] is False
    assert document["warnings"]
    for row in document["layers"]:
        assert (row["method"], row["fallback"]) == ("rtn", "no calibration")
        assert row["calibrated"] is False
    assert document["totals"]["fallbacks"] == 7
    assert totals("--activations", "elsewhere")[0]["totals"]["calibrated"] is True


def test_require_calibration_makes_its_absence_an_error(job):
    outcome = ptq("gptq", job, "--require-calibration")
    assert outcome.code == 1
    assert "no calibration found" in outcome.errors[0]
    assert not list(Path().glob("model-gptq*"))


def test_strict_makes_the_warning_an_error_before_any_work(job):
    outcome = ptq("gptq", job, "--strict")
    assert outcome.code == 1
    assert "NO CALIBRATION" in outcome.errors[0]
    assert not list(Path().glob("model-gptq*"))


def test_linears_left_out_with_ignore_need_no_activations(job):
    Path("acts/layers.0.down_proj.npy").unlink()
    arguments = ["gptq", job, "--activations", "acts", "-o", "out"]
    assert ptq(*arguments).code == 1
    assert ptq(*arguments, "--ignore", "down_proj").code == 0


def test_fallback_rtn_allows_a_linear_without_activations_and_names_it(job):
    Path("acts/layers.0.down_proj.npy").unlink()
    arguments = ["gptq", job, "--activations", "acts", "--json", "--fallback", "rtn"]
    document = ptq(*arguments).document
    fallbacks = {row["module"]: row["fallback"] for row in document["layers"] if row["fallback"]}
    assert fallbacks == {"layers.0.down_proj": "no statistics for it"}
    assert any("layers.0.down_proj" in warning for warning in document["warnings"])
    assert document["totals"]["calibrated"] is False


# ---- recipes ----


def recipe(text):
    path = Path("recipe.toml")
    path.write_text(text)
    return path


def test_a_recipe_sets_what_the_command_line_does_not(job):
    path = recipe('method = "gptq"\nbits = 3\ngroup_size = 16\nsym = false\nignore = ["down"]\n')
    arguments = ["gptq", job, "--activations", "acts", "--json", "--config", path]
    document = ptq(*arguments, "--bits", 5).document
    assert (document["settings"]["bits"], document["settings"]["group_size"]) == (5, 16)
    assert document["settings"]["sym"] is False
    assert "layers.0.down_proj" not in {row["module"] for row in document["layers"]}
    assert Path("model-gptq-w5g16-asym").is_dir()


def test_layer_rules_change_single_layers(job, check_report):
    path = recipe(
        'bits = 4\n[[layers]]\nmatch = "o_proj"\nbits = 8\ngroup_size = -1\n'
        '[[layers]]\nmatch = "down_proj"\nskip = true\n'
        '[[layers]]\nmatch = "k_proj"\nsym = false\n'
    )
    outcome = ptq("gptq", job, "--activations", "acts", "--json", "--config", path, "-o", "out")
    rows = {row["module"]: row for row in check_report(outcome.document)["layers"]}
    assert set(rows) == {"layers.0.q_proj", "layers.0.k_proj", "layers.0.o_proj"}
    assert (rows["layers.0.o_proj"]["bits"], rows["layers.0.o_proj"]["group_size"]) == (8, -1)
    assert [rows[f"layers.0.{n}_proj"]["sym"] for n in "qk"] == [True, False]
    before, after = (read_model(p) for p in (job, Path("out/model.safetensors")))
    assert after["layers.0.down_proj.weight"] == before["layers.0.down_proj.weight"]


@pytest.mark.parametrize("rule", ["[[layers]]\nmatch = '.'\nbits = 3\n", "bits = 3\n"])
def test_all_linears_of_a_site_take_the_rule(job, rule):
    document = ptq("rtn", job, "--json", "--config", recipe(rule)).document
    assert {row["bits"] for row in document["layers"]} == {3}


# ---- which tensors ----


def test_include_takes_in_embeddings_and_the_output_head(job, check_report):
    include = ["--include", "embed_tokens", "--include", "lm_head"]
    outcome = ptq("gptq", job, "--activations", "acts", "--json", *include, "-o", "out")
    rows = {row["module"]: row for row in check_report(outcome.document)["layers"]}
    # an embedding has no inputs: its search weighs all columns alike
    for module, fallback in {"embed_tokens": None, "lm_head": "no statistics for it"}.items():
        assert rows[module]["method"] == "rtn"
        assert rows[module]["fallback"] == fallback
        assert ptq_cli.load_weight("out", module).shape == (50, 32)
    assert any("lm_head" in warning for warning in outcome.warnings)


def test_ignore_leaves_tensors_as_they_are(job):
    document = ptq("pack", job, "--json", "--ignore", "q_proj.weight|k_proj", "-o", "out").document
    reasons = {entry["tensor"]: entry["reason"] for entry in document["left_alone"]}
    assert reasons == {
        "embed_tokens.weight": "embedding",
        "layers.0.q_proj.weight": "ignored",
        "layers.0.k_proj.weight": "ignored",
        "layers.0.q_proj.bias": "rank 1",
        "layers.0.input_layernorm.weight": "rank 1",
        "positions": "dtype I64",
        "lm_head.weight": "output head",
    }


# ---- act-order ----


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_desc_writes_g_idx_and_what_it_decodes_to_is_what_was_measured(job, bits):
    options = ["--act-order", "desc", "-g", 8, "--bits", bits, "--activations", "acts"]
    document = ptq("gptq", job, *options, "--json", "-o", "out").document
    tensors = read_model(Path("out/model.safetensors"))
    weights = read_model(job)
    for row in document["layers"]:
        dtype, shape, data = tensors[f"{row['module']}.g_idx"]
        assert (dtype, shape) == ("I32", [row["shape"][1]])
        groups = np.frombuffer(data, np.int32)
        assert sorted(groups) == [i // 8 for i in range(len(groups))]
        assert not np.array_equal(groups, np.sort(groups))
        bf16 = np.frombuffer(weights[row["layer"]][2], np.uint16).astype(np.uint32) << 16
        weight = bf16.view(np.float32).reshape(row["shape"])
        error = np.abs(weight - ptq_cli.load_weight("out", row["module"])).max()
        assert error == pytest.approx(row["max_abs_err"], rel=1e-6)


# ---- the commands as functions ----


def test_the_public_names_are_these():
    assert ptq_cli.__all__ == sorted(ptq_cli.__all__)
    assert set(ptq_cli.__all__) >= {
        *("PtqError", "QuantizedLinear", "__version__", "calibrate", "evaluate"),
        *("gptq", "rtn", "pack", "load_linear", "load_weight"),
    }
    for name in ptq_cli.__all__:
        assert getattr(ptq_cli, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = ptq_cli.nothing_like_it


def test_functions_write_what_commands_write(job):
    assert ptq("calibrate", job, "--activations", "acts", "-o", "a.safetensors").code == 0
    result = ptq_cli.calibrate(job, ["acts"], "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert set(result["sites"]) == {f"layers.0.{n}_proj" for n in ("q", "o", "down")}
    for verb in (ptq_cli.gptq, ptq_cli.rtn, ptq_cli.pack):
        name = verb.__name__
        source = [] if name == "pack" else ["--calibration", "a.safetensors"]
        own = {} if name == "pack" else {"calibration": "a.safetensors"}
        assert ptq(name, job, "-b", 3, "-g", 8, *source, "-o", f"{name}-c").code == 0
        report = verb(job, bits=3, group_size=8, **own, output=f"{name}-f")
        assert tree(Path(f"{name}-c")) == tree(Path(f"{name}-f"))
        assert report.totals["layers"] == 4
    report = ptq_cli.evaluate(job, "gptq-f", calibration="a.safetensors")
    assert report.totals["gain_vs_rtn"] > 1


def test_functions_raise_the_projects_own_errors(job):
    with pytest.raises(ptq_cli.PtqError, match="out of range"):
        ptq_cli.gptq(job, bits=9)
    with pytest.raises(ptq_cli.PtqError, match="unknown settings bit"):
        ptq_cli.gptq(job, bit=4)
    with pytest.raises(ptq_cli.PtqError, match="nowhere"):
        ptq_cli.load_weight("nowhere", "layers.0.q_proj")


def test_a_quantized_linear_computes(job):
    ptq_cli.gptq(job, activations=["acts"], bits=8, group_size=16, output="out")
    linear = ptq_cli.load_linear("out", "layers.0.q_proj")
    assert isinstance(linear, ptq_cli.QuantizedLinear)
    inputs = np.load("acts/layers.0.q_proj.npy")[:12].reshape(3, 4, 32)
    tensors = read_model(job)
    bf16 = np.frombuffer(tensors["layers.0.q_proj.weight"][2], np.uint16).astype(np.uint32) << 16
    bias = np.frombuffer(tensors["layers.0.q_proj.bias"][2], np.float32)
    exact = inputs.astype(np.float32) @ bf16.view(np.float32).reshape(12, 32).T + bias
    outputs = linear(inputs)
    assert outputs.shape == (3, 4, 12)
    np.testing.assert_allclose(outputs, exact, atol=0.02 * np.abs(exact).max())
    with pytest.raises(ptq_cli.PtqError, match="32"):
        linear(inputs[..., :5])


# ---- shards and folders ----


def test_shards_with_an_index_give_the_weights_of_one_file(job):
    from tests.builders import small_tensors, write_model

    tensors = small_tensors()
    Path("sharded").mkdir()
    weight_map = {}
    for shard, names in enumerate((list(tensors)[:4], list(tensors)[4:])):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        write_model(Path("sharded", file), {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = Path("sharded/model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    Path("sharded/config.json").write_text('{"model_type": "llama"}')
    whole = ptq("gptq", job, "--activations", "acts", "-o", "whole")
    assert whole.code == 0
    for name, model in (("a", "sharded"), ("b", index)):
        assert ptq("gptq", model, "--activations", "acts", "-o", name).code == 0
        assert Path(name, "config.json").read_text() == '{"model_type": "llama"}'
        assert read_model(Path(name, "model.safetensors")) == read_model(
            Path("whole/model.safetensors")
        )
    assert ptq("eval", "sharded", "whole", "--activations", "acts").code == 0


def test_a_folder_of_shards_of_activations_is_one_file(job):
    inputs = np.load("acts/layers.0.q_proj.npy")
    Path("acts/layers.0.q_proj.npy").unlink()
    Path("acts/layers.0.q_proj").mkdir()
    for i, start in enumerate(range(0, 96, 32)):
        np.save(f"acts/layers.0.q_proj/{i:03d}.npy", inputs[start : start + 32])
    assert ptq("calibrate", job, "--activations", "acts", "-o", "shards.safetensors").code == 0
    np.save("acts/layers.0.q_proj.npy", inputs)
    for i in range(3):
        Path(f"acts/layers.0.q_proj/{i:03d}.npy").unlink()
    assert ptq("calibrate", job, "--activations", "acts", "-o", "whole.safetensors").code == 0
    ours, whole = (read_model(Path(f"{n}.safetensors")) for n in ("shards", "whole"))
    assert ours.keys() == whole.keys()
    for name in whole:
        if not name.endswith(("hessian", "absmean")):  # sums of other chunks: the last bits
            assert ours[name] == whole[name], name
    for part in ("hessian", "absmean"):
        name = f"layers.0.q_proj.{part}"
        a, b = (np.frombuffer(content[name][2], np.float32) for content in (ours, whole))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
