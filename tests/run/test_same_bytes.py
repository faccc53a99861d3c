"""The same bytes for any number of workers, for any environment, interrupted or not; and resume."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.builders import ROOT, SAMPLE, ptq, tree
from tests.stopping import TOLD, stopped

MODEL = SAMPLE / "model.safetensors"


def run(*arguments, **environment):
    """`ptq` in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "ptq_cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The folder that one process makes without an interruption."""
    folder = tmp_path_factory.mktemp("expected")
    assert ptq("gptq", MODEL, "-o", folder / "gptq", "--workers", 1).code == 0
    assert ptq("calibrate", MODEL, "-o", folder / "stats.safetensors", "--workers", 1).code == 0
    return folder


@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8))])
def test_any_number_of_workers(tmp_path, expected, workers):
    assert ptq("gptq", MODEL, "-o", tmp_path / "gptq", "--workers", workers).code == 0
    assert tree(tmp_path / "gptq") == tree(expected / "gptq")
    assert os.listdir(tmp_path) == ["gptq"]


def test_statistics_too(tmp_path, expected):
    target = tmp_path / "stats.safetensors"
    assert ptq("calibrate", MODEL, "-o", target, "--workers", 2).code == 0
    assert target.read_bytes() == (expected / "stats.safetensors").read_bytes()


@pytest.mark.slow
def test_little_memory_one_at_a_time(tmp_path, expected):
    outcome = ptq("gptq", MODEL, "-o", tmp_path / "gptq", "--workers", 2, "--max-memory", "1MB")
    assert outcome.code == 0
    assert any("each runs alone" in warning for warning in outcome.warnings)
    assert tree(tmp_path / "gptq") == tree(expected / "gptq")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "workers"), [("1", 2), ("2", 1), ("2", 2), (None, 1)], ids=lambda n: f"{n}"
)
def test_openblas_num_threads_1_2_and_unset(tmp_path, expected, monkeypatch, threads, workers):
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    more = {} if threads is None else {"OPENBLAS_NUM_THREADS": threads}
    run("gptq", MODEL, "-o", tmp_path / "gptq", "--workers", workers, **more)
    assert tree(tmp_path / "gptq") == tree(expected / "gptq")
    run("calibrate", MODEL, "-o", tmp_path / "stats", "--workers", workers, **more)
    assert (tmp_path / "stats").read_bytes() == (expected / "stats.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "TZ": "Asia/Tokyo"},
        {"LC_ALL": "tr_TR.UTF-8", "COLUMNS": "20", "PYTHONHASHSEED": "7", "TERM": "dumb"}
        | {"HOME": "/nowhere", "NO_COLOR": "1"},
    ],
    ids=lambda env: " ".join(env),
)
def test_any_environment(tmp_path, expected, environment):
    run("gptq", MODEL, "-o", tmp_path / "gptq", "--workers", 2, **environment)
    assert tree(tmp_path / "gptq") == tree(expected / "gptq")


@pytest.mark.slow
def test_inputs_that_moved(tmp_path, expected, monkeypatch):
    shutil.copytree(SAMPLE, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    run("gptq", "elsewhere/model.safetensors", "-o", "gptq")
    assert tree(tmp_path / "gptq") == tree(expected / "gptq")


@pytest.mark.slow
def test_interrupted_again_and_again(tmp_path, expected):
    """By each signal, later each time; at 28 all layers are rounded and the files are written."""
    arguments = ["gptq", MODEL, "-o", tmp_path / "gptq", "--workers", 2]
    signals = itertools.cycle([signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
    for calls, number in zip((1, 2, 5, 14, 27, 28, 29), signals, strict=False):
        code, err = stopped(TOLD, calls, number.name, *arguments)
        assert code == (-number if number == signal.SIGKILL else 128 + number), err
        assert "Traceback" not in err
        assert os.listdir(tmp_path) == ["gptq.partial"]
    run(*arguments)
    assert tree(tmp_path / "gptq") == tree(expected / "gptq")
    assert os.listdir(tmp_path) == ["gptq"]


# ---- resume ----


def interrupted(tmp_path, monkeypatch, model=MODEL, after=4, *more):
    """What a run leaves that is stopped after some units."""
    from ptq_cli.run import unit_job

    work, done = unit_job.quantize_unit, []

    def stop(unit, *rest, **options):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(unit.name)
        return work(unit, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(unit_job, "quantize_unit", stop)
        with pytest.raises(KeyboardInterrupt):
            ptq("gptq", model, "-o", tmp_path / "gptq", "--workers", 1, *more)
    return done


def copied(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "in")
    return tmp_path / "in" / "model.safetensors"


def middle_changed(path, tensor):
    """One bit in the middle of a tensor's data, where no sample of a fingerprint looks."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[tensor]["data_offsets"]
    content[8 + length + (begin + end) // 4 * 2] ^= 1  # the last bit of a value
    path.write_bytes(content)


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch, expected):
    done = interrupted(tmp_path, monkeypatch)
    from ptq_cli.run import unit_job

    work, redone = unit_job.quantize_unit, []
    monkeypatch.setattr(
        unit_job, "quantize_unit", lambda u, *r, **o: (redone.append(u.name), work(u, *r, **o))[1]
    )
    assert ptq("gptq", MODEL, "-o", tmp_path / "gptq", "--workers", 1).code == 0
    assert len(done) == 4
    assert set(redone).isdisjoint(done)
    assert tree(tmp_path / "gptq") == tree(expected / "gptq")


def test_a_weight_that_changed_in_its_middle_is_named_and_the_work_stays(tmp_path, monkeypatch):
    model = copied(tmp_path)
    done = interrupted(tmp_path, monkeypatch, model, 12)
    kept = tree(tmp_path / "gptq.partial")
    middle_changed(model, f"{done[5]}.weight")
    outcome = ptq("gptq", model, "-o", tmp_path / "gptq", "--workers", 1)
    assert outcome.code == 1
    assert f"another tensor '{done[5]}.weight'" in outcome.errors[0]
    assert "--restart" in outcome.errors[0]
    assert tree(tmp_path / "gptq.partial") == kept
    assert ptq("gptq", model, "-o", tmp_path / "gptq2", "--workers", 1).code == 0
    assert ptq("gptq", model, "-o", tmp_path / "gptq", "--restart").code == 0
    assert tree(tmp_path / "gptq") == tree(tmp_path / "gptq2")


def test_activations_that_changed_are_named(tmp_path, monkeypatch):
    model = copied(tmp_path)
    done = interrupted(tmp_path, monkeypatch, model, 15)
    for path in (tmp_path / "in/activations").glob("*down_proj.npy"):
        values = np.load(path)
        values[len(values) // 4, 3] += 1
        np.save(path, values)
    outcome = ptq("gptq", model, "-o", tmp_path / "gptq", "--workers", 1)
    assert any("down_proj" in unit for unit in done)
    assert outcome.code == 1
    assert "another statistics" in outcome.errors[0]
    assert (tmp_path / "gptq.partial/units").is_dir()


def test_both_failures_are_named_and_what_is_finished_is_kept(tmp_path):
    from tests.builders import random_weight, small_activations, small_model

    bad = random_weight(12, 32)
    bad[3, 4] = np.nan
    worse = random_weight(32, 40)
    worse[0, 1] = np.inf
    model = small_model(
        tmp_path / "model.safetensors",
        **{"layers.0.q_proj.weight": bad, "layers.0.down_proj.weight": worse},
    )
    activations = small_activations(tmp_path / "acts")
    outcome = ptq("gptq", model, "--activations", activations, "-o", tmp_path / "o", "--workers", 2)
    assert outcome.code == 1
    assert "'layers.0.q_proj.weight'" in outcome.errors[0] or "q_proj" in outcome.errors[0]
    assert "layers.0.down_proj" in outcome.errors[0]
    assert "o.partial, --restart drops them" in outcome.errors[0]
    assert not (tmp_path / "o").exists()


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    few = type("Few", (), {"f_bavail": 100, "f_frsize": real.f_frsize})
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    outcome = ptq("gptq", MODEL, "-o", tmp_path / "o")
    assert outcome.code == 1
    assert "MB are needed" in outcome.errors[0]
    assert os.listdir(tmp_path) == []


def test_shards_of_the_size_that_was_asked_for(tmp_path):
    outcome = ptq("pack", MODEL, "-o", tmp_path / "o", "--max-shard-size", "500kB")
    assert outcome.code == 0
    shards = [n for n in os.listdir(tmp_path / "o") if n.endswith(".safetensors")]
    assert len(shards) > 2
    assert all((tmp_path / "o" / n).stat().st_size < 600_000 for n in shards)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        assert ptq("pack", MODEL, "-o", tmp_path / "o").code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "o").stat().st_mode & 0o777 == 0o777 & ~umask
    for path in (tmp_path / "o").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
