"""Disks that are full, and two runs into one output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import ROOT, SAMPLE, ptq, tree
from tests.stopping import TOLD, start

MODEL = SAMPLE / "model.safetensors"
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from ptq_cli.cli.main import run
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        *(("gptq", 100), ("gptq", 200_000), ("calibrate", 20_000), ("calibrate", 1_000_000)),
        pytest.param("gptq", 1_000_000, marks=pytest.mark.slow),
        pytest.param("calibrate", 200_000, marks=pytest.mark.slow),
    ],
)
def test_a_limit_on_files_is_an_error_and_nothing_is_left(tmp_path, command, limit):
    words = [limit, command, MODEL, "-o", tmp_path / "o", "--workers", 1]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    first, *others = result.stderr.splitlines()
    assert first.startswith("ptq: error: ")
    assert [line[:11] for line in others] in ([], ["ptq: hint: "])
    assert "internal" not in result.stderr
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


@pytest.mark.slow(3)
def test_two_runs_into_one_output(tmp_path):
    assert ptq("gptq", MODEL, "-o", tmp_path / "expected", "--workers", 1).code == 0
    first = start(TOLD, 3, "pause", "gptq", MODEL, "-o", tmp_path / "o", "-q")
    assert first.stdout.readline() == "paused\n"
    second = ptq("gptq", MODEL, "-o", tmp_path / "o")
    assert second.code == 1
    assert "another run is working" in second.errors[0]
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert tree(tmp_path / "o") == tree(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "o"]
    assert not Path(f"{tmp_path}/o.partial").exists()
