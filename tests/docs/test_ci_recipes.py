"""docs/ci: the shell script and the workflow are run as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from tests.builders import ROOT, SAMPLE, copy_sample

CI = ROOT / "docs" / "ci"
WORKFLOW = yaml.safe_load((CI / "quantize.yml").read_text())
STEPS = WORKFLOW["jobs"]["quantize"]["steps"]


@pytest.fixture
def place(tmp_path) -> Path:
    """A checkout's folder: sample_data, docs/ci, and `ptq` and `python` on the PATH."""
    copy_sample(tmp_path / "sample_data")
    few = np.load(SAMPLE / "eval_tokens.npy")[:8]
    np.save(tmp_path / "sample_data" / "eval_tokens.npy", few)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "ci").symlink_to(CI)
    (tmp_path / "bin").mkdir()
    for name, words in (("ptq", "-m ptq_cli"), ("python", "")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def bash(place, *arguments, **env):
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=place,
        env={"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(place), "CI": "true", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def failures(path):
    suite = ElementTree.parse(path).getroot()
    return {case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None}


@pytest.mark.slow
def test_the_script_passes(place):
    done = bash(place, "docs/ci/quantize.sh", "sample_data", "out")
    assert done.returncode == 0, done.stderr
    assert "in vllm: not tried" in done.stdout
    assert "[28/28] " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    reports = place / "reports"
    for name in ("quantize", "eval"):
        assert failures(reports / f"{name}.xml") == set()
        assert len(json.loads((reports / f"{name}.json").read_text())["layers"]) == 28
    assert (place / "out" / "config.json").is_file()


@pytest.mark.slow
def test_the_script_fails_where_a_gate_is_missed(place):
    env = {"MIN_GAIN": "9", "TOKENS": "sample_data/eval_tokens.npy", "MAX_KL": "1e-9"}
    done = bash(place, "docs/ci/quantize.sh", "sample_data", "out", **env)
    assert done.returncode == 3, done.stderr
    (error,) = [x for x in done.stderr.splitlines() if x.startswith("ptq: error: ")]
    assert "--min-gain 9" in error
    assert failures(place / "reports" / "eval.xml") == {"--min-gain 9", "--max-kl 1e-09"}
    assert json.loads((place / "reports" / "eval.json").read_text())["quality"]["tokens"] > 0
    assert "in vllm: not tried" in done.stdout  # what comes after is still done


@pytest.mark.slow
def test_the_script_fails_where_the_runtime_does_not_load_it(place):
    done = bash(place, "docs/ci/quantize.sh", "sample_data", "out", RUNTIME="llama.cpp")
    assert done.returncode == 3, done.stderr
    assert failures(place / "reports" / "eval.xml") == set()


def test_the_script_fails_without_calibration(place):
    for path in (place / "sample_data" / "activations").iterdir():
        path.unlink()
    (place / "sample_data" / "activations").rmdir()
    done = bash(place, "docs/ci/quantize.sh", "sample_data", "out")
    assert done.returncode == 1
    assert "no calibration found" in done.stderr
    assert not (place / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("min_gain", ["1.8", "9"])
def test_the_steps_of_the_workflow(min_gain, place):
    """Every `run:` but the installation; those with `if: always()` also after a failure."""
    summary = place / "summary.md"
    env = {**WORKFLOW["jobs"]["quantize"]["env"], "GITHUB_STEP_SUMMARY": str(summary)}
    env["MIN_GAIN"] = min_gain
    codes = {}
    for step in STEPS:
        skipped = any(codes.values()) and step.get("if") != "always()"
        if "run" in step and step["name"] != "Install" and not skipped:
            done = bash(place, "-e", "-o", "pipefail", "-c", step["run"], **env)
            codes[step["name"]] = done.returncode
    assert codes == {"Quantize": 0 if min_gain == "1.8" else 3, "Summary": 0}
    assert "| 28 | " in summary.read_text()
    missed = set() if min_gain == "1.8" else {"--min-gain 9"}
    for step in STEPS:  # what is kept is there
        if step.get("uses", "").startswith("actions/upload"):
            assert list((place / step["with"]["path"]).iterdir())
    reports = {path.name: failures(path) for path in place.glob("reports/*.xml")}
    assert reports == {"quantize.xml": set(), "eval.xml": missed}


def test_the_workflow_is_one():
    assert set(WORKFLOW) == {"name", True, "permissions", "jobs"}  # YAML 1.1 reads `on` as True
    assert STEPS[2]["run"] == "python -m pip install ."
    for step in STEPS:
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"name", "uses", "run", "with", "if"}
        if "uses" in step:
            assert step["uses"].count("@v") == 1
    assert [step["name"] for step in STEPS if step.get("if") == "always()"] == [
        "Summary", "Keep the reports", "Show the reports",
    ]  # fmt: skip


def test_the_document_names_every_gate_and_exit_code():
    from ptq_cli.cli.shared_options import GATES

    text = (ROOT / "docs" / "ci.md").read_text()
    for gate in GATES:
        assert f"`--{gate.replace('_', '-')}" in text
    for code in (0, 1, 2, 3, 4, 130, 143):
        assert f"\n| {code}" in text or f", {code} |" in text
