"""Disks that are full, and two runs into one output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import ROOT, SAMPLE, ptq, tree

MODEL = SAMPLE / "model.safetensors"
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from ptq_cli.cli.main import run
sys.exit(run(sys.argv[2:]))
"""


def started(script, *arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *script, *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=env, **pipes)


@pytest.mark.parametrize("limit", [100, 20_000, 200_000, 1_000_000])
@pytest.mark.parametrize("command", ["gptq", "calibrate"])
def test_a_limit_on_files_is_an_error_and_nothing_is_left(tmp_path, command, limit):
    process = started(["-c", LIMITED], limit, command, MODEL, "-o", tmp_path / "o", "--workers", 1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    first, *others = err.splitlines()
    assert first.startswith("ptq: error: ")
    assert [line[:11] for line in others] in ([], ["ptq: hint: "])
    assert "internal" not in err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("size", ["64k", "600k", "2m"])
def test_a_small_disk(tmp_path, size):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        outcome = ptq("gptq", MODEL, "-o", tmp_path / "o", "--workers", 2)
        assert outcome.code == 1
        assert "free" in outcome.errors[0] or "No space" in outcome.errors[0]
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_two_runs_into_one_output(tmp_path):
    assert ptq("gptq", MODEL, "-o", tmp_path / "expected", "--workers", 1).code == 0
    runs = [started(["-m", "ptq_cli"], "gptq", MODEL, "-o", tmp_path / "o") for _ in range(3)]
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in runs]
    assert sorted({code for _, code in ends}) in ([0], [0, 1])
    for err, code in ends:
        assert code == 0 or "another run is working" in err or "exists already" in err, err
    assert [code for _, code in ends].count(0) == 1
    assert tree(tmp_path / "o") == tree(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "o"]
    assert not Path(f"{tmp_path}/o.partial").exists()
