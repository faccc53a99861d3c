"""What a failure leaves: finished units, from which the same command goes on to the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ptq_cli.errors import NumericalError
from ptq_cli.run.workers import WorkerLost
from ptq_cli.storage.files import file_error
from ptq_cli.storage.units import UnitStore
from tests.builders import SAMPLE, half_sample, ptq, random_weight, small_job, small_model, tree

MODEL = SAMPLE / "model.safetensors"
PLAINLY = ("--refine", 0, "--sweeps", 0, "--no-mse")  # so that a run takes less


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the command makes when nothing disturbs it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert ptq("gptq", MODEL, *PLAINLY, "-o", out, "--workers", 1).code == 0
    return tree(out)


@pytest.fixture
def command(tmp_path):
    return "gptq", MODEL, *PLAINLY, "-o", tmp_path / "out", "--workers", 1


def disturbed(monkeypatch, command, number, error):
    """Run a command whose `number`-th unit meets an error when it is kept; the outcome, and the
    units that were kept before."""
    put, kept = UnitStore.put, []

    def failing(self, unit, *rest, **options):
        if len(kept) == number - 1:
            raise error
        put(self, unit, *rest, **options)
        kept.append(self.path(unit, ""))

    with monkeypatch.context() as patch:
        patch.setattr(UnitStore, "put", failing)
        try:
            return ptq(*command), kept
        except KeyboardInterrupt:
            return None, kept


def made(monkeypatch, command):
    """Run a command to its end; the outcome, and the units that it did."""
    return disturbed(monkeypatch, command, 10_000, None)


def test_a_full_disk_leaves_what_two_runs_have_finished(tmp_path, monkeypatch, command, whole):
    """An interrupted run of ten units; the same command, and the disk is full at its third unit:
    all twelve are kept, and the next run does the rest."""
    _, first = disturbed(monkeypatch, command, 11, KeyboardInterrupt())
    error = file_error(tmp_path / "out.partial", full())
    outcome, second = disturbed(monkeypatch, command, 3, error)
    assert outcome.code == 1
    assert "No space left" in outcome.errors[0]
    kept = f"12 finished units are kept in {tmp_path}/out.partial, the same command goes on from"
    assert kept in outcome.errors[0]
    assert os.listdir(tmp_path) == ["out.partial"]
    outcome, rest = made(monkeypatch, command)
    assert outcome.code == 0
    assert (len(first), len(second), len(rest)) == (10, 2, 4)
    assert tree(tmp_path / "out") == whole
    assert os.listdir(tmp_path) == ["out"]


ERRORS = {
    "disk": (lambda: file_error("x", full()), 1, "goes on from there"),
    "system": (full, 1, "goes on from there"),
    "memory": (MemoryError, 1, "goes on from there"),
    "bug": (RuntimeError, 1, "goes on from there"),
    "worker": (lambda: WorkerLost("it ended"), 1, "goes on from there"),
    "numbers": (lambda: NumericalError("not positive", hint="help"), 4, "--restart drops them"),
}


@pytest.mark.parametrize(("error", "code", "words"), ERRORS.values(), ids=ERRORS)
def test_finished_units_survive_every_error(
    tmp_path, monkeypatch, command, whole, error, code, words
):
    outcome, kept = disturbed(monkeypatch, command, 5, error())
    assert outcome.code == code
    assert len(outcome.errors) == 1
    assert f"4 finished units are kept in {tmp_path}/out.partial, " in outcome.errors[0]
    assert words in outcome.errors[0]
    assert {path.suffix for path in tmp_path.glob("out.partial/out/*")} <= {".safetensors"}
    outcome, rest = made(monkeypatch, command)
    assert outcome.code == 0
    assert set(kept).isdisjoint(rest)
    assert len(kept) + len(rest) == 16
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("error", [full, MemoryError, RuntimeError])
def test_a_folder_without_a_finished_unit_goes(tmp_path, monkeypatch, command, error):
    outcome, _ = disturbed(monkeypatch, command, 1, error())
    assert outcome.code == 1
    assert "kept" not in outcome.errors[0]
    assert os.listdir(tmp_path) == []


def test_too_little_space_to_go_on_leaves_all_as_it_is(tmp_path, monkeypatch, command, whole):
    disturbed(monkeypatch, command, 4, KeyboardInterrupt())
    before = tree(tmp_path)
    few = type("Few", (), {"f_bavail": 1, "f_frsize": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: few)
        outcome = ptq(*command)
    assert outcome.code == 1
    assert "MB are needed" in outcome.errors[0]
    assert "3 finished units are kept" in outcome.errors[0]
    assert tree(tmp_path) == before
    assert ptq(*command).code == 0
    assert tree(tmp_path / "out") == whole


def test_an_error_while_the_output_is_put_together(tmp_path, monkeypatch, command, whole):
    from ptq_cli.storage.staging import Staging

    def failing(self):
        raise full()

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", failing)
        outcome = ptq(*command)
    assert "16 finished units are kept" in outcome.errors[0]
    assert os.listdir(tmp_path) == ["out.partial"]
    assert {path.suffix for path in tmp_path.glob("out.partial/out/*")} <= {".safetensors"}
    outcome, rest = made(monkeypatch, command)
    assert (outcome.code, rest) == (0, [])
    assert tree(tmp_path / "out") == whole


def other_command(name, folder):
    model, activations = small_job(folder)
    if name == "repack":
        words = ("--activations", activations, "-g", 16, "-o", folder / "packed")
        assert ptq("rtn", model, *words).code == 0
        return "pack", folder / "packed", "--format", "ptq"
    if name == "calibrate":
        return "calibrate", model, "--activations", activations, "--workers", 1
    sample = half_sample(folder / "sample", blocks=1)
    return name, sample, "--tokens", sample / "calibration_tokens.npy", "--nsamples", 4


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("calibrate", ()),
        ("repack", ()),
        pytest.param("smoothquant", (), marks=pytest.mark.slow),
        pytest.param("awq", ("--parallel-layers", "--no-compare"), marks=pytest.mark.slow),
        ("smoothquant", ("--bits", 16)),
    ],
)
def test_every_command_goes_on_after_an_error(tmp_path, monkeypatch, name, more):
    words = (*other_command(name, tmp_path), *more)
    out = tmp_path / "out"
    _, units = made(monkeypatch, (*words, "-o", out))
    before = tree(out) if out.is_dir() else out.read_bytes()
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    outcome, kept = disturbed(monkeypatch, (*words, "-o", out), 3, full())
    assert outcome.code == 1
    assert "finished units are kept in" in outcome.errors[0]
    outcome, rest = made(monkeypatch, (*words, "-o", out))
    assert outcome.code == 0, outcome.err
    assert (set(kept) & set(rest), len(kept) + len(rest)) == (set(), len(units))
    assert (tree(out) if out.is_dir() else out.read_bytes()) == before
    assert not Path(f"{out}.partial").exists()


def test_a_mistake_in_the_inputs_keeps_what_was_finished_and_says_how_to_drop_it(tmp_path):
    bad = random_weight(32, 12)
    bad[3, 4] = float("nan")
    model, activations = small_job(tmp_path)
    small_model(model, **{"layers.0.o_proj.weight": bad})
    words = ("--activations", activations, "-o", tmp_path / "out", "--workers", 1)
    outcome = ptq("gptq", model, *words)
    assert outcome.code == 1
    assert "o_proj" in outcome.errors[0]
    assert "out.partial, --restart drops them" in outcome.errors[0]
    assert not (tmp_path / "out").exists()
    small_model(model)
    assert "other model; --restart" in ptq("gptq", model, *words).errors[0]
    assert ptq("gptq", model, *words, "--restart").code == 0


def test_a_smoothing_that_cannot_be_planned_leaves_no_lock(tmp_path, monkeypatch):
    from ptq_cli.run import smooth_in_sequence

    def failing(*_arguments):
        raise RuntimeError("oh")

    sample = half_sample(tmp_path / "sample", blocks=1)
    words = ("smoothquant", sample, "--tokens", sample / "calibration_tokens.npy")
    with monkeypatch.context() as patch:
        patch.setattr(smooth_in_sequence, "place_groups", failing)
        assert ptq(*words, "--nsamples", 2, "-o", tmp_path / "out").code == 1
    assert os.listdir(tmp_path) == ["sample"]
    assert ptq(*words, "--nsamples", 2, "-o", tmp_path / "out").code == 0
