"""The same command on its own finished output says so and exits as that run did, without work."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.report.report import as_document, report_from_document
from ptq_cli.storage.staging import Staging
from tests.builders import (
    SAMPLE,
    half_sample,
    ptq,
    random_weight,
    small_job,
    small_model,
    small_tensors,
    tree,
)

SAID = "ptq: note: out: finished already, from the same inputs and settings"
TOKENS = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 4)
COMMANDS = {
    "gptq": ("gptq", "model", "--bits", 3),
    "gptq tokens": ("gptq", "model", *TOKENS),
    "rtn": ("rtn", "model"),
    "rtn gptq": ("rtn", "model", "--format", "gptq"),
    "rtn gguf": ("rtn", "model", "--format", "gguf", "-g", 32),
    "awq": ("awq", "model", "--no-compare", "--n-grid", 2),
    "smoothquant": ("smoothquant", "model", *TOKENS),
    "floats": ("smoothquant", "model", "--bits", 16),
    "pack": ("pack", "model/model.safetensors"),
    "repack": ("pack", "packed", "--format", "gptq"),
    "calibrate": ("calibrate", "model"),
    "calibrate tokens": ("calibrate", "model", *TOKENS),
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """A folder with a model and what `ptq rtn` makes of it; not to be changed."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        half_sample(Path("model"), blocks=1)
        assert ptq("rtn", "model", "-o", "out").code == 0
    return folder


@pytest.fixture
def sample(once):
    shutil.copytree(once / "model", "model")


@pytest.fixture
def no_work(monkeypatch):
    def refused(self, target):
        raise AssertionError("work is begun")

    monkeypatch.setattr(Staging, "__init__", refused)


def content(path):
    return tree(path) if path.is_dir() else path.read_bytes()


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


@pytest.mark.usefixtures("sample")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_again_does_no_work_and_says_so(monkeypatch, name):
    command = (*COMMANDS[name], "-o", "out", "--json")
    if name == "repack":
        assert ptq("rtn", "model", "-o", "packed").code == 0
    if name == "rtn gguf":
        pytest.importorskip("gguf")
    first = ptq(*command)
    assert first.code == 0, first.err
    before, inode = content(Path("out")), Path("out").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "__init__", None)
        begin = time.process_time()
        again = ptq(*command)
        assert time.process_time() - begin < 1
    assert again.code == 0, again.err
    assert again.err.splitlines()[-1] == SAID
    assert without_seconds(json.loads(again.out)) == without_seconds(json.loads(first.out))
    assert (content(Path("out")), Path("out").stat().st_ino) == (before, inode)
    assert not Path("out.partial").exists()
    forced = ptq(*command, "--force")
    assert forced.code == 0
    assert "finished already" not in forced.err
    assert Path("out").stat().st_ino != inode
    assert content(Path("out")) == before


@pytest.fixture
def made(once, sample):
    shutil.copytree(once / "out", "out")


@pytest.mark.usefixtures("made", "no_work")
def test_gates_are_held_against_the_report_anew():
    assert ptq("rtn", "model", "-o", "out", "--max-rel-err", 1).code == 0
    missed = ptq("rtn", "model", "-o", "out", "--max-rel-err", 1e-6)
    assert missed.code == 3
    assert SAID in missed.err
    assert "quality gate missed: --max-rel-err 1e-06" in missed.errors[0]


@pytest.mark.usefixtures("sample", "undrawn")
def test_reports_are_written_again(monkeypatch):
    pytest.importorskip("matplotlib")
    names = ("r.json", "r.csv", "j.xml", "h.html")

    def run():
        for name in names:
            Path(name).unlink(missing_ok=True)
        words = ("rtn", "model", "-o", "out", "--max-rel-err", 1)
        more = ("--junit", "j.xml", "--html", "h.html")
        assert ptq(*words, "--report", "r.json", *more).code == 0
        outcome = ptq(*words, "--report", "r.csv")
        assert outcome.code == 0
        return outcome

    run()
    first = {name: Path(name).read_bytes() for name in names}
    monkeypatch.setattr(Staging, "__init__", None)
    table = run().out
    assert "written: " not in table
    again = {name: Path(name).read_bytes() for name in names}
    assert again["h.html"] == first["h.html"]
    for written in (first, again):
        written["j.xml"] = re.sub(rb' time="[^"]*"', b"", written["j.xml"])
        written["r.json"] = without_seconds(json.loads(written["r.json"]))
        rows = list(csv.DictReader(io.StringIO(written.pop("r.csv").decode())))
        written["rows"] = without_seconds(rows)
    assert again == first


@pytest.mark.usefixtures("made")
def test_other_settings_and_inputs_are_named():
    def refused(*words):
        outcome = ptq("rtn", "model", "-o", "out", *words)
        assert outcome.code == 1
        return outcome.errors[0]

    assert "out: exists already, made with other bits; --force" in refused("--bits", 3)
    assert "made with other bits, group-size; --force" in refused("-b", 3, "-g", 32)
    many = refused("-b", 3, "-g", 32, "--asym", "--no-mse", "--scale-dtype", "float32")
    assert "made with other bits, group-size, mse and 2 more; --force" in many
    other = ptq("pack", "model", "-o", "out").errors
    assert other[0].endswith(
        "out: exists already, made by ptq rtn; --force replaces it, -o chooses another output"
    )
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"vocab_size": 2047}))
    assert "made with other config 'vocab_size'; --force" in refused()
    Path("model/config.json").write_text(json.dumps(config))
    assert ptq("rtn", "model", "-o", "out").code == 0
    Path("model/tokenizer_config.json").write_text("{}")  # it was copied, and is another now
    assert "out: exists already, made with another tokenizer_config.json; --force" in refused()


def _cut(path):
    os.truncate(path, path.stat().st_size // 2)


def _garbled(path):
    path.write_bytes(path.read_bytes()[::-1])


LEFT = "is not as the run left it"
DAMAGES = {
    "no weights": ("model.safetensors", Path.unlink, "but model.safetensors is missing"),
    "weights cut": ("model.safetensors", _cut, f"but model.safetensors {LEFT} ("),
    "no config": ("config.json", Path.unlink, "but config.json is missing"),
    "config garbled": ("config.json", _garbled, f"but config.json {LEFT}; "),
    "no declaration": ("quantization.json", Path.unlink, "but quantization.json is missing"),
    "no report": ("report.json", Path.unlink, "but report.json is missing"),
    "report garbled": ("report.json", _garbled, f"but report.json {LEFT}; "),
    "no job": ("ptq_job.json", Path.unlink, "but ptq_job.json is missing"),
    "job garbled": ("ptq_job.json", _garbled, "but ptq_job.json is damaged"),
    "files of a job garbled": (
        "ptq_job.json",
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"files": 3})),
        "but ptq_job.json is damaged",
    ),
}


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_output_is_not_finished(name):
    file, damage, said = DAMAGES[name]
    whole = content(Path("out"))
    damage(Path("out", file))
    left = content(Path("out"))
    refused, planned = (ptq("rtn", "model", "-o", "out", *more) for more in ((), ("--dry-run",)))
    for outcome in (refused, planned):
        assert outcome.code == 1
        assert f"out: exists already, {said}" in outcome.errors[0]
        assert "; --force replaces it" in outcome.errors[0]
    assert content(Path("out")) == left
    assert ptq("rtn", "model", "-o", "out", "--force").code == 0
    assert content(Path("out")) == whole


@pytest.mark.usefixtures("made")
def test_numbers_of_a_report_that_were_changed_pass_no_gate():
    path = Path("out/report.json")
    text = path.read_text()
    path.write_text(text.replace('"rel_err": 0.00', '"rel_err": 0.01'))
    assert (path.read_text() != text, path.stat().st_size) == (True, len(text))
    refused = ptq("rtn", "model", "-o", "out", "--max-rel-err", 1)
    assert f"out: exists already, but report.json {LEFT}; --force" in refused.errors[0]


@pytest.mark.usefixtures("made")
def test_a_file_that_somebody_adds_to_an_output_is_no_damage():
    Path("out/notes.json").write_text("{")
    assert SAID in ptq("rtn", "model", "-o", "out").err


@pytest.mark.usefixtures("sample")
def test_statistics_that_are_cut_short_are_named():
    command = ("calibrate", "model", "-o", "c.safetensors")
    assert ptq(*command).code == 0
    size = Path("c.safetensors").stat().st_size
    os.truncate("c.safetensors", size - 1)
    said = f"cut short: the header asks for {size} bytes, the file has {size - 1}; --force"
    assert f"c.safetensors: exists already, but {said}" in ptq(*command).errors[0]
    assert ptq(*command, "--force").code == 0


@pytest.mark.usefixtures("sample")
def test_what_a_folder_has_beside_the_weights_is_missing():
    assert ptq("rtn", "model/model.safetensors", "-o", "out").code == 0
    refused = ptq("rtn", "model", "-o", "out").errors
    assert "out: exists already, without README.md; --force" in refused[0]


@pytest.mark.usefixtures("sample")
def test_a_file_where_a_run_would_work_is_to_be_removed():
    Path("out.partial").write_text("mine")
    for more in ((), ("--dry-run",)):
        (error,) = ptq("rtn", "model", "-o", "out", *more).errors
        assert "out.partial: not a folder; it is where this run would work; remove it" in error
    assert Path("out.partial").read_text() == "mine"


def test_sites_stand_in_the_order_of_their_numbers(tmp_path):
    names = [f"layers.{i}.o_proj" for i in range(12)]
    weights: dict[str, np.ndarray | None] = dict.fromkeys(small_tensors())
    weights |= {f"{name}.weight": random_weight(4, 8) for name in names}
    small_model(tmp_path / "m.safetensors", **weights)
    Path("acts").mkdir()
    for name in names:
        np.save(f"acts/{name}.npy", np.ones((9, 8), np.float32))
    command = ("calibrate", "m.safetensors", "--activations", "acts", "-o", "c.safetensors")
    for _ in range(2):
        outcome = ptq(*command)
        assert outcome.code == 0, outcome.err
        shown = [line.split()[0] for line in outcome.out.splitlines() if "o_proj" in line]
        assert shown == names
    assert "written" not in outcome.out
    assert list(ptq_cli.calibrate("m.safetensors", ["acts"], "c.safetensors")["sites"]) == names


@pytest.mark.usefixtures("made")
def test_what_is_no_output_of_this_tool_is_refused_as_ever():
    Path("out/ptq_job.json").write_text("[" * 100_000)
    outcome = ptq("rtn", "model", "-o", "out")
    assert "out: exists already, but ptq_job.json is damaged; --force" in outcome.errors[0]
    shutil.rmtree("out")
    Path("out").write_text("mine")
    assert (
        "out: exists already, but not a safetensors file"
        in ptq("rtn", "model", "-o", "out").errors[0]
    )


@pytest.mark.usefixtures("made", "no_work")
def test_inputs_elsewhere_are_the_same_inputs():
    Path("model").rename("moved")
    assert ptq("rtn", "moved", "-o", "out").code == 0


@pytest.mark.usefixtures("made", "no_work")
def test_a_dry_run_says_that_nothing_would_be_done():
    outcome = ptq("rtn", "model", "-o", "out", "--dry-run")
    assert outcome.code == 0
    assert outcome.out == (
        "out: finished already, from the same inputs and settings; nothing would be done\n"
    )
    planned = json.loads(ptq("rtn", "model", "-o", "out", "--dry-run", "--json").out)
    assert (planned["finished"], planned["disk"]["needed"]) == (True, 0)
    planned = json.loads(ptq("rtn", "model", "-o", "new", "--dry-run", "--json").out)
    assert planned["finished"] is False


@pytest.mark.usefixtures("sample")
def test_after_a_kill_behind_the_last_rename(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "_drop", Staging.close)
        assert ptq("rtn", "model", "-o", "out").code == 0
    assert Path("out.partial").is_dir()
    again = ptq("rtn", "model", "-o", "out")
    assert (again.code, SAID in again.err) == (0, True)
    assert not Path("out.partial").exists()


@pytest.mark.usefixtures("made")
def test_work_of_another_run_into_the_same_output_stays(monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            ptq("rtn", "model", "-o", "out", "--bits", 3, "--force")
    work = tree(Path("out.partial"))
    assert work
    assert ptq("rtn", "model", "-o", "out").code == 0
    assert tree(Path("out.partial")) == work


def test_the_functions_say_it_too(tmp_path):
    model, activations = small_job(tmp_path)
    first = ptq_cli.gptq(model, activations=[activations], output="out")
    again = ptq_cli.gptq(model, activations=[activations], output="out")
    assert (first.earlier, again.earlier) == (False, True)
    assert as_document(again, times=False) == as_document(first, times=False)
    first = ptq_cli.calibrate(model, [activations], "c.safetensors")
    again = ptq_cli.calibrate(model, [activations], "c.safetensors")
    assert (first.pop("earlier"), again.pop("earlier")) == (False, True)
    assert without_seconds(again) == without_seconds(first)


def test_a_report_comes_back_from_its_document(tmp_path):
    model, activations = small_job(tmp_path)
    words = ("--activations", activations, "--activation-scheme", "dynamic-token")
    assert ptq("rtn", model, "--activations", activations, "-o", "out").code == 0
    assert ptq("eval", model, "out", *words, "--report", "r.json").code == 0
    for path in ("r.json", "out/report.json"):
        document = json.loads(Path(path).read_text())
        times = path == "r.json"
        document.pop("output", None)
        assert as_document(report_from_document(document), times=times) == document
