"""`--html` on every command that reports, and `ptq report`: what is in the page, when it is
written, and that nothing starts where it cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.storage.quantized import open_quantized
from tests.builders import LINEARS, ptq, random_inputs, small_activations, small_model, tree
from tests.report.html.reading import cells, read

SMALL = ("--group-size", "8")


@pytest.fixture(scope="module")
def sample(one_block):
    return one_block


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`model.safetensors`, `acts/`, and what gptq makes of them: `w4`, `w3`."""
    folder = tmp_path_factory.mktemp("folders")
    small_model(folder / "model.safetensors")
    small_activations(folder / "acts")
    for bits in (4, 3):
        outcome = ptq(
            "gptq", folder / "model.safetensors", "--activations", folder / "acts",
            "--bits", bits, *SMALL, "-o", folder / f"w{bits}",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
    return folder


def shown(path: str | Path):
    return read(Path(path).read_text())


def layers(path: str | Path) -> dict[str, dict[str, str]]:
    return {row["Layer"]: row for row in cells(shown(path).by_id("layers"))}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", ["gptq", "rtn", "pack", "eval"])
def test_each_command_writes_a_page_of_its_report(folders, command):
    model, sources = folders / "model.safetensors", ("--activations", folders / "acts")
    arguments = {
        "gptq": (model, *SMALL, *sources), "rtn": (model, *SMALL, *sources),
        "pack": (model, *SMALL), "eval": (model, folders / "w4", *sources),
    }[command]  # fmt: skip
    outcome = ptq(command, *arguments, "--html", "page.html", "--json")
    assert outcome.code == 0, outcome.err
    rows = layers("page.html")
    assert len(rows) == len(LINEARS)
    for row in outcome.document["layers"]:
        name = row["module"].removeprefix("layers.0.")
        error = row["rel_err"] if row["heldout_rel_err"] is None else row["heldout_rel_err"]
        assert float(rows[name]["Error"]) == pytest.approx(error, rel=6e-3)
    titles = [title.text for title in shown("page.html").all("h3")]
    assert sum(title.startswith("Codes and scales") for title in titles) == 3
    assert any(title.startswith("Input channels") for title in titles) == (command != "pack")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", ["awq", pytest.param("smoothquant", marks=pytest.mark.slow)])
def test_smoothing_commands_write_one_too(sample, command):
    fast = ("--n-grid", "6") if command == "awq" else ()
    outcome = ptq(command, sample, *fast, "--html", "page.html", "-o", "out")
    assert outcome.code == 0, outcome.err
    root = shown("page.html")
    assert "sites smoothed" in root.text
    assert "After the smoothing factors" in root.text
    assert ("Methods compared" in root.text) == (command == "awq")


@pytest.mark.usefixtures("undrawn")
def test_float_weights_have_a_page_without_layers(sample):
    outcome = ptq("smoothquant", sample, "--bits", "16", "--html", "page.html", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert "No layer was quantized." in shown("page.html").text


@pytest.mark.slow
def test_perplexity_and_integer_inputs_stand_on_the_page_of_eval(sample):
    assert ptq("gptq", sample, "-o", "out").code == 0
    tokens = np.load(sample / "eval_tokens.npy")[:2, :64]
    np.save("tokens.npy", tokens)
    outcome = ptq(
        "eval", sample, "out", "--tokens", "tokens.npy", "--kl-per-block",
        "--activation-scheme", "dynamic-token", "--html", "page.html", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    quality, root = outcome.document["quality"], shown("page.html")
    for name in ("original", "quantized", "rtn"):
        assert f"{quality['perplexity'][name]:.4f}" in root.text
    titles = {title.text for title in root.all("h3")}
    assert {"KL divergence by block", "With integer inputs"} <= titles
    assert "Integer error" in root.by_id("layers").text


@pytest.mark.usefixtures("undrawn")
def test_histograms_are_those_of_the_folder(folders):
    assert ptq("report", folders / "w4").code == 0
    folder = open_quantized(folders / "w4")
    captions = [c.text for c in shown("report.html").all("figcaption")]
    found = 0
    for module in LINEARS:
        weight = folder.load(module)
        codes, scales = np.bincount(weight.codes.reshape(-1), minlength=16), weight.scales
        ends = 100 * (codes[0] + codes[-1]) / codes.sum()
        words = (
            f"{module}: {(codes > 0).sum()} of 16 codes are used, {ends:.2g} % of the weights have"
            f" the lowest or the highest. {scales.size} scales from"
            f" {float(scales.min()):.3g} to {float(scales.max()):.3g}."
        )
        found += words in captions
    assert found == 3


@pytest.mark.usefixtures("undrawn")
def test_channels_are_those_of_the_inputs(folders):
    calibrated = ptq(
        "calibrate", folders / "model.safetensors", "--activations", folders / "acts",
        "-o", "statistics.safetensors", "--heldout-every", "0",
    )  # fmt: skip
    assert calibrated.code == 0, calibrated.err
    assert ptq("report", folders / "w4", "--calibration", "statistics.safetensors").code == 0
    captions = " ".join(c.text for c in shown("report.html").all("figcaption"))
    for site in ("layers.0.q_proj", "layers.0.o_proj", "layers.0.down_proj"):
        peaks = np.abs(np.load(folders / "acts" / f"{site}.npy").astype(np.float32)).max(axis=0)
        words = f"Inputs of {site}: {len(peaks)} channels, the largest is channel {peaks.argmax()}"
        assert f"{words} with {peaks.max():.3g}, {peaks.max() / np.median(peaks):.3g}" in captions


@pytest.mark.usefixtures("undrawn")
def test_a_loud_channel_is_named(folders, tmp_path):
    inputs = random_inputs(96, 32)
    inputs[:, 5] *= 100
    small_activations(tmp_path / "loud", **{"layers.0.q_proj": inputs})
    outcome = ptq(
        "rtn", folders / "model.safetensors", "--activations", "loud", *SMALL, "-o", "out",
        "--html", "page.html",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "32 channels, the largest is channel 5" in shown("page.html").text
    assert "1 channels are above ten times the median" in shown("page.html").text


@pytest.mark.usefixtures("undrawn")
def test_a_missed_gate_is_on_the_page_that_is_written_all_the_same(folders):
    outcome = ptq(
        "eval", folders / "model.safetensors", folders / "w4", "--activations", folders / "acts",
        "--min-gain", "99", "--max-fallbacks", "0", "--html", "page.html",
    )  # fmt: skip
    assert outcome.code == 3
    root = shown("page.html")
    lines = [item.text for item in root.all("li")]
    (missed,) = [line for line in lines if line.startswith("missed")]
    assert missed.startswith("missed --min-gain 99: gain_vs_rtn is ")
    assert missed.removeprefix("missed ") in outcome.errors[0]
    assert [line for line in lines if line.startswith("passed --max-fallbacks 0")]
    assert "1 missed" in [tile.text for tile in root.all("strong")]


@pytest.mark.slow
def test_the_same_run_is_the_same_page(folders):
    for name in ("a", "b"):
        outcome = ptq("rtn", folders / "model.safetensors", *SMALL, "-o", "out", "--force",
                      "--html", f"{name}.html")  # fmt: skip
        assert outcome.code == 0
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()


# ---- ptq report ----


def test_several_runs_are_told_apart(folders):
    outcome = ptq("report", folders / "w4", folders / "w3/report.json", "-o", "both.html")
    assert (outcome.code, outcome.out) == (0, "written: both.html\n")
    rows = layers("both.html")
    for bits in (4, 3):
        document = json.loads((folders / f"w{bits}" / "report.json").read_text())
        for row in document["layers"]:
            own = rows[row["module"].removeprefix("layers.0.")]
            assert float(own[f"w{bits}"]) == pytest.approx(row["heldout_rel_err"], rel=6e-3)
            assert own["Best"] == "w4"
    root = shown("both.html")
    assert "2 runs compared" in root.text
    assert all(len(picture.all("text")) > 2 for picture in root.all("svg"))


@pytest.mark.usefixtures("undrawn")
def test_folders_of_one_name_get_longer_names(folders, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "out").symlink_to(folders / "w4")
    (tmp_path / "a" / "out").unlink()
    (tmp_path / "a" / "out").mkdir()
    content = (folders / "w3" / "report.json").read_bytes()
    (tmp_path / "a" / "out" / "report.json").write_bytes(content)
    assert ptq("report", "a/out", "a/out", folders / "w4").code == 0
    heads = [head.text for head in shown("report.html").by_id("layers").all("th")]
    assert any(head.endswith("out (1)") for head in heads)


def test_a_report_alone_has_a_page_without_histograms(folders, tmp_path):
    (tmp_path / "r.json").write_bytes((folders / "w4" / "report.json").read_bytes())
    assert ptq("report", "r.json").code == 0
    titles = [title.text for title in shown("report.html").all("h3")]
    assert "Error of each layer" in titles
    assert not [title for title in titles if title.startswith("Codes")]


@pytest.mark.usefixtures("undrawn")
def test_writing_a_page_leaves_the_folder_alone(folders):
    before = tree(folders)
    assert ptq("report", folders / "w4").code == 0
    assert tree(folders) == before


# ---- what cannot be ----


@pytest.mark.parametrize("command", ["gptq", "rtn", "pack", "awq", "smoothquant", "eval", "report"])
def test_a_missing_matplotlib_is_said_before_the_work(folders, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    first = folders / ("w4" if command == "report" else "model.safetensors")
    arguments = {"report": ("-o", "p.html"), "eval": (folders / "w4", "--html", "p.html")}
    outcome = ptq(command, first, *arguments.get(command, ("-o", "out", "--html", "p.html")))
    assert outcome.code == 1
    (error,) = outcome.errors
    assert "needs matplotlib, which is not installed" in error
    assert list(Path().iterdir()) == []


def test_without_a_page_matplotlib_is_not_missed(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ptq("rtn", folders / "model.safetensors", *SMALL, "-o", "out").code == 0


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("page.pdf", "page.pdf: a page is .html or .htm"),
        ("nowhere/page.html", "nowhere: no such folder"),
        ("folder.html", "folder.html: a folder; name a file for a page"),
    ],
)
@pytest.mark.parametrize("command", ["rtn", "report"])
def test_pages_that_cannot_be_written_are_refused_before_the_work(folders, command, path, words):
    Path("folder.html").mkdir()
    first = (folders / "w4", "-o") if command == "report" else (
        folders / "model.safetensors", *SMALL, "-o", "out", "--html")  # fmt: skip
    outcome = ptq(command, *first, path)
    assert outcome.code == 1
    assert outcome.errors == [f"ptq: error: {words}"]
    assert [entry.name for entry in Path().iterdir()] == ["folder.html"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing", "nothing: No such file or directory"),
        ("empty", "empty: no report.json in it"),
        ("model.safetensors", "model.safetensors: not valid JSON"),
        ("list.json", "list.json: not a report of ptq: the document is list, not object"),
    ],
)
def test_what_is_no_report_is_refused(folders, path, words):
    Path("empty").mkdir()
    Path("list.json").write_text("[]")
    small_model(Path("model.safetensors"))
    for command in (
        ("report", path),
        ("diff", path, folders / "w4"),
        ("diff", folders / "w4", path),
    ):
        outcome = ptq(*command)
        assert outcome.code == 1
        (error,) = outcome.errors
        assert words in error
    assert not Path("report.html").exists()


def test_damaged_weights_are_an_error(folders, tmp_path):
    (tmp_path / "out").mkdir()
    for name, content in tree(folders / "w4").items():
        (tmp_path / "out" / name).write_bytes(content[:-9] if name.endswith("tensors") else content)
    outcome = ptq("report", "out")
    assert outcome.code == 1
    assert "model.safetensors" in outcome.errors[0]
    assert not Path("report.html").exists()


def test_statistics_go_with_one_run(folders):
    outcome = ptq("report", folders / "w4", folders / "w3", "--calibration", "x.safetensors")
    assert outcome.code == 2
