"""A kill at every state-changing call, and every such call failing: RELIABILITY in practice."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.builders import ROOT, small_job


def cases(tmp_path, kind, step, command, old):
    """Run tests/attacks/faults.py on a small model."""
    model, activations = small_job(tmp_path)
    words = [command, str(model), "--activations", str(activations)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    script = [sys.executable, "-m", "tests.attacks.faults", kind, str(step)]
    result = subprocess.run(
        [*script, str(tmp_path / "work"), "1" if old else "0", *words],
        env=env,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) > 40 // step
    return found


def check_kill(case):
    assert case["code"] == -9, case
    assert case["state"] in ("before", "whole"), case
    check_again(case)


def check_failure(case):
    assert case["code"] in (0, 1), case
    assert not case["traceback"], case
    assert case["state"] == ("whole" if case["code"] == 0 else case["state"]), case
    assert case["state"] in ("before", "whole"), case
    cleaning = case["call"].split()[1] in ("unlink", "rmdir")
    assert case["left"] == [] or cleaning, case
    check_again(case)


def check_again(case):
    assert case["again"] == 0, case
    assert case["again_state"] == "whole", case
    assert case["again_left"] == [], case


STEPS = [
    pytest.param(7, id="every seventh"),
    pytest.param(1, id="every one", marks=pytest.mark.slow),
]
OLD = pytest.mark.parametrize("old", [False, True], ids=["new", "over an older output"])


@pytest.mark.parametrize("step", STEPS)
@OLD
@pytest.mark.parametrize("command", ["gptq", "calibrate"])
def test_a_kill_leaves_the_old_or_the_new_and_the_rerun_ends_the_same(tmp_path, step, old, command):
    for case in cases(tmp_path, "kill", step, command, old):
        check_kill(case)


@pytest.mark.parametrize("step", STEPS)
@OLD
@pytest.mark.parametrize(("command", "kind"), [("gptq", "ENOSPC"), ("calibrate", "EIO")])
def test_a_failing_call_is_an_error_or_does_no_harm(tmp_path, step, old, command, kind):
    for case in cases(tmp_path, kind, step, command, old):
        check_failure(case)


@pytest.mark.slow
@OLD
@pytest.mark.parametrize("kind", ["EIO", "EACCES"])
def test_other_failures(tmp_path, old, kind):
    for case in cases(tmp_path, kind, 1, "gptq", old):
        check_failure(case)
