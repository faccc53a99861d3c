"""Ctrl-C and SIGTERM: the exit code, one line, no traceback, no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.builders import ROOT, SAMPLE


def started(tmp_path, *more):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    model = SAMPLE / "model.safetensors"
    words = ["gptq", str(model), "-o", str(tmp_path / "o"), "--sweeps", "40", "-q", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "ptq_cli", *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_work(tmp_path, process):
    """Until a unit is being worked on, or finished."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "o.partial/units").is_dir():
            return
        time.sleep(0.01)
    pytest.fail("it never began")


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_one_line_while_it_works(tmp_path, number, word, workers):
    process = started(tmp_path, "--workers", workers)
    wait_for_work(tmp_path, process)
    time.sleep(0.3)
    os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err == f"ptq: {word}; finished work is kept, the same command goes on\n"
    assert not list((tmp_path / "o.partial/units").glob("*.tmp"))
    assert not (tmp_path / "o").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.06, 0.12, pytest.param(0.3, marks=pytest.mark.slow)])
def test_during_imports(tmp_path, number, delay):
    # The interpreter's own start cannot be answered for: wait until ours has begun.
    script = (
        "import ptq_cli.__main__ as m, sys; print(1, flush=True); sys.argv[0] = 'ptq'; m.main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, "eval", "--help"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    time.sleep(delay / 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    if process.returncode == 0:
        return  # it was faster
    assert process.returncode == 128 + number, err
    assert err in ("ptq: interrupted\n", "ptq: terminated\n")


def test_the_handlers_stand_before_anything_is_imported():
    """What comes before them is answered by Python, with a traceback."""
    script = (
        "import sys; there = set(sys.modules); import ptq_cli.cli.signals;"
        "print(*sorted(set(sys.modules) - there))"
    )
    command = [sys.executable, "-c", script]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    own = {"ptq_cli", "ptq_cli._version", "__future__", "ptq_cli.cli", "ptq_cli.cli.signals"}
    own |= {"ptq_cli.storage", "ptq_cli.storage.interruption"}
    assert set(result.stdout.split()) <= own
