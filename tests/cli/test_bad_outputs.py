"""Places where no output can be, or where something lies that is not ours to replace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import ptq, small_model, tree
from tests.refusals import refused


@pytest.mark.parametrize("command", ["gptq", "rtn", "pack", "calibrate"])
def test_an_existing_output_is_refused_without_force_and_exchanged_with_it(command, job):
    source = [] if command == "pack" else ["--activations", "acts"]
    Path("out").mkdir() if command != "calibrate" else Path("out").write_text("mine")
    arguments = [command, job, *source, "-o", "out"]
    refused(*arguments, words=("out", "exists", "--force"))
    assert ptq(*arguments, "--force").code == 0
    assert Path("out").is_file() == (command == "calibrate")
    first = tree(Path()) if command != "calibrate" else Path("out").read_bytes()
    assert ptq(*arguments, "--force").code == 0
    assert first == (tree(Path()) if command != "calibrate" else Path("out").read_bytes())


@pytest.mark.parametrize("output", [".", "..", "/", "nowhere/out", "model.safetensors/out"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_outputs_that_cannot_be(output, force, job):
    refused("pack", job, "-o", output, *force)


def test_a_dangling_link_as_output(job):
    Path("out").symlink_to("nothing")
    refused("pack", job, "-o", "out", "--force", words=("out", "link"))


def test_a_name_too_long_for_the_file_system(job):
    refused("pack", job, "-o", "x" * 300, words=("File name too long",))


@pytest.mark.parametrize("output", ["m", "m/model.safetensors", "acts", "stats", "linked"])
def test_an_output_never_replaces_what_is_read(output, job):
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    Path("linked").symlink_to("m")
    Path("stats").mkdir()
    stats = Path("stats/c.safetensors")
    assert ptq("calibrate", "m", "--activations", "acts", "-o", stats).code == 0
    source = ["--calibration", stats] if output == "stats" else ["--activations", "acts"]
    refused("gptq", "m", *source, "-o", output, "--force", words=("which is being read",))


@pytest.mark.parametrize("output", ["model.safetensors", "acts", "acts/layers.0.q_proj.npy"])
def test_a_calibration_never_replaces_what_is_read(output, job):
    arguments = ["calibrate", job, "--activations", "acts", "-o", output, "--force"]
    refused(*arguments, words=("which is being read",))


@pytest.mark.parametrize("path", ["r.txt", "r", "nowhere/r.csv", "folder.json"])
def test_report_paths_are_checked_before_the_work(path, job):
    Path("folder.json").mkdir()
    refused("pack", job, "--report", path, words=(path.split("/")[0],))


def test_a_work_folder_that_is_somebody_elses_is_not_touched(job):
    Path("out.partial").mkdir()
    Path("out.partial/thesis.txt").write_text("mine")
    before = tree(Path())
    outcome = ptq("pack", job, "-o", "out")
    assert outcome.code == 1
    assert "out.partial" in outcome.errors[0]
    assert tree(Path()) == before


def test_a_work_folder_that_is_a_link_is_not_followed(job):
    Path("elsewhere").mkdir()
    Path("elsewhere/thesis.txt").write_text("mine")
    Path("out.partial").symlink_to("elsewhere")
    before = tree(Path())
    assert ptq("pack", job, "-o", "out").code == 1
    assert tree(Path()) == before
