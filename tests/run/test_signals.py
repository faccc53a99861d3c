"""Ctrl-C and SIGTERM: the exit code, one line, no traceback, no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.builders import ROOT, SAMPLE
from tests.stopping import STAGED, TOLD, start

SIGNALS = pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)


@SIGNALS
@pytest.mark.parametrize(
    ("workers", "place"),
    [(1, STAGED), pytest.param(1, TOLD, marks=pytest.mark.slow), (2, TOLD)],
)
def test_one_line_while_it_works(tmp_path, number, word, workers, place):
    words = ["gptq", SAMPLE / "model.safetensors", "-o", tmp_path / "o", "-q"]
    process = start(place, 3, f"group {number.name}", *words, "--workers", workers)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == f"ptq: {word}; finished work is kept, the same command goes on\n"
    assert list((tmp_path / "o.partial/units").glob("*.json"))
    assert not list((tmp_path / "o.partial/units").glob("*.tmp"))
    assert not (tmp_path / "o").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


IMPORTING = """
import sys
import ptq_cli.__main__
import os
left = int(sys.argv.pop(1))
number = int(sys.argv.pop(1))

def count(event, _):
    global left
    if event == "import":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

sys.addaudithook(count)
ptq_cli.__main__.main()
"""


@SIGNALS
@pytest.mark.parametrize("imports", [1, 20, 60])
def test_during_imports(number, word, imports):
    """At an import of the command's own, the interpreter's start being Python's affair."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(imports), str(int(number)), "eval", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stderr) == (128 + number, f"ptq: {word}\n")
    assert result.stdout == ""


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
