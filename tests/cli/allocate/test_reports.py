"""From a budget to `ptq eval`: what was predicted stands in the reports, beside what was measured;
whatever was edited in between breaks nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ptq_cli.report.html import drawing
from tests.builders import ptq
from tests.cli.allocate.words import done, recipe_of
from tests.report.html.reading import read

LINE = re.compile(r"^predicted KL (\S+), measured (\S+) ± (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(llama, quick, tmp_path_factory) -> Path:
    """`tokens.npy`, `recipe.toml`, and what it makes of the model: `out`, `out.gguf`."""
    folder = tmp_path_factory.mktemp("allocated")
    shutil.copy(llama / "tokens.npy", folder)
    shutil.copy(quick / "r.toml", folder / "recipe.toml")
    tokens = ("--tokens", folder / "tokens.npy")
    done("rtn", llama, *tokens, "--config", folder / "recipe.toml", "-o", folder / "out")
    budget = ("--choices", "Q4_0,Q8_0", "--target-bpw", 6, "--table", folder / "table.json")
    done("rtn", llama, *tokens, *budget, "-o", folder / "out.gguf")
    return folder


@pytest.fixture
def _one_chart(monkeypatch):
    """Of a page's charts only that of budgets is drawn, which takes most of the time."""
    draw = drawing.draw_chart
    monkeypatch.setattr(
        drawing,
        "draw_chart",
        lambda *own, **more: draw(*own, **more) if own[0] == "allocation" else "",
    )


def evaluate(model: Path, output: Path, folder: Path, *more: str):
    return ptq("eval", model, output, "--tokens", folder / "tokens.npy", *more)


def said_bits(folder: Path) -> str:
    """Bits a weight of the recipe."""
    return f"{recipe_of(folder / 'recipe.toml')['allocation']['bits_per_weight']:.2f}"


def report_of(output: Path) -> Path:
    folder = output / "report.json"
    return folder if output.is_dir() else output.with_name("out.report.json")


@pytest.mark.usefixtures("_one_chart")
@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_eval_says_what_was_predicted_and_measured(llama, folder, check_report, name):
    outcome = evaluate(llama, folder / name, folder, "--report", "e.json", "--html", "e.html")
    assert outcome.code == 0, outcome.err
    predicted, measured, spread = map(float, LINE.search(outcome.out).groups())
    document = check_report(json.loads(Path("e.json").read_text()))
    own = check_report(json.loads(report_of(folder / name).read_text()))
    said, kl = own["settings"]["allocation"], document["quality"]["kl"]["quantized"]
    assert document["settings"]["allocation"] == said
    assert predicted == pytest.approx(said["predicted_kl"], rel=5e-3)
    assert measured == pytest.approx(kl["mean"], rel=5e-3)
    assert spread == pytest.approx(kl["standard_error"], rel=5e-2)
    root = read(Path("e.html").read_text())
    assert f"measured {measured:.3g} ± {spread:.2g}" in root.text
    assert root.by_id("allocation-caption").text.startswith("Predicted KL of the best mix")
    assert "Mix of widths" in root.text


@pytest.mark.usefixtures("_one_chart")
def test_the_run_itself_says_what_was_predicted(llama, folder):
    recipe = ("--tokens", folder / "tokens.npy", "--config", folder / "recipe.toml")
    outcome = ptq("rtn", llama, *recipe, "-o", folder / "out", "--html", "page.html")
    assert outcome.code == 0, outcome.err
    assert re.search(r"^predicted KL 0\.\d+$", outcome.out, re.MULTILINE)
    line = rf"^14 layers at {said_bits(folder)} bits/weight \(\d+ W\dA16, .*\), \d"
    assert re.search(line, outcome.out, re.M)
    assert "Predicted KL" in read(Path("page.html").read_text()).text


def test_a_mix_that_was_edited_is_not_taken_for_the_predicted_one(llama, folder):
    rule = "\n[[layers]]\nmatch = 'mlp'\nbits = 8\n"
    Path("edited.toml").write_text((folder / "recipe.toml").read_text() + rule)
    recipe = ("--tokens", folder / "tokens.npy", "--config", "edited.toml")
    outcome = ptq("rtn", llama, *recipe, "-o", "other")
    assert outcome.code == 0, outcome.err
    line = rf"^predicted KL 0\.\d+ of another mix, {said_bits(folder)} bits/weight$"
    assert re.search(line, outcome.out, re.M)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("predicted_kl = ", "predicted_kl = -", "allocation: predicted_kl = -0."),
        ("bits_per_weight = ", "bits_per_weight = 'x'  # ", "allocation: bits_per_weight = 'x'"),
        ("curve = [", "curve = [ 3,", "allocation: curve = [3, ["),
        ("[allocation]", "[[allocation]]", "allocation = ("),
        ("bytes = ", "when = 2020-01-01\nbytes = ", "unknown key of [allocation] 'when'"),
    ],
)
def test_a_garbled_recipe_is_one_line(llama, folder, old, new, words):
    text = (folder / "recipe.toml").read_text()
    assert old in text
    Path("garbled.toml").write_text(text.replace(old, new, 1))
    outcome = ptq("rtn", llama, "--config", "garbled.toml", "-o", "never")
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) <= 2
    assert outcome.err.startswith(f"ptq: error: garbled.toml: {words}")
    assert not Path("never").exists()


@pytest.mark.parametrize("said", ["x", {"curve": 1}, {"predicted_kl": "x"}, None])
def test_eval_does_without_a_report_that_was_garbled(llama, folder, said):
    shutil.copytree(folder / "out", "out")
    document = json.loads(Path("out/report.json").read_text())
    document["settings"]["allocation"] = said
    Path("out/report.json").write_text(json.dumps(document))
    outcome = evaluate(llama, Path("out"), folder, "--json")
    assert outcome.code == 0, outcome.err
    assert "allocation" not in outcome.document["settings"]
    outcome = ptq("report", "out")
    assert outcome.code == 1
    assert "report.json: not a report of ptq: settings.allocation" in outcome.err


def test_eval_does_without_a_report(llama, folder):
    shutil.copytree(folder / "out", "out")
    Path("out/report.json").unlink()
    outcome = evaluate(llama, Path("out"), folder)
    assert outcome.code == 0, outcome.err
    assert "predicted KL" not in outcome.out
