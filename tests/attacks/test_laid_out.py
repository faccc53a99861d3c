"""Files of the output that are laid out beforehand and filled: shrinking inputs, kills before and
after the output gets its name, disks that fill up, file systems without exchange."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ptq_cli.storage import files
from ptq_cli.storage import staging as S
from ptq_cli.storage.shards import Shards
from tests.builders import ptq, small_job, small_model, tree


@pytest.fixture
def job(tmp_path):
    """A command without its output, and what it makes when nothing disturbs it."""
    model, acts = small_job(tmp_path)
    words = ["gptq", model, "--activations", acts, "--workers", 1, "-o"]
    assert ptq(*words, tmp_path / "whole").code == 0
    return words, tree(tmp_path / "whole"), tmp_path / "out"


def only_finished_units(path, outcome):
    """What an error leaves: nothing, or finished units without half an output, and it says so."""
    left = [name for name in os.listdir(path.parent) if name.startswith(path.name)]
    units = len(list(path.parent.glob(f"{path.name}.partial/units/*.json")))
    if not units:
        return left == []
    said = f"{units} finished unit" in outcome.errors[0] and f"{path}.partial" in outcome.errors[0]
    made = Path(f"{path}.partial/out").glob("*")
    return (
        left == [f"{path.name}.partial"] and said and {p.suffix for p in made} <= {".safetensors"}
    )


@pytest.mark.parametrize("command", ["rtn", "pack"])
def test_an_input_that_shrinks_while_it_is_copied_is_an_error(tmp_path, monkeypatch, command):
    """It had been a SIGBUS, when copies were read through memory maps."""
    model = small_model(tmp_path / "model.safetensors")
    put = Shards.put

    def shrinking(self, tensors):
        with open(model, "r+b") as file:
            file.truncate(os.path.getsize(model) - 10)  # within lm_head, which is only copied
        put(self, tensors)

    monkeypatch.setattr(Shards, "put", shrinking)
    outcome = ptq(command, model, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "changed while it was read" in outcome.errors[0]
    assert "model.safetensors" in outcome.errors[0]
    assert only_finished_units(tmp_path / "out", outcome)


def test_a_disk_that_fills_up_while_files_with_holes_are_filled(job, monkeypatch):
    words, whole, out = job
    pwrite, calls = os.pwrite, 0

    def full(descriptor, data, place):
        nonlocal calls
        calls += 1
        if calls > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        outcome = ptq(*words, out)
    assert outcome.code == 1
    assert "No space left" in outcome.errors[0]
    assert "free some space" in outcome.errors[0]
    assert only_finished_units(out, outcome)
    assert ptq(*words, out).code == 0
    assert tree(out) == whole


def stopped(monkeypatch, words, *, when):
    """Run a command that ends before (or after) its output gets its name, as by a kill."""
    publish = S.Staging.publish

    def stop(self):
        if when == "after the name":
            self._drop = lambda: close_as_killed(self)
            publish(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(S.Staging, "publish", stop)
        patch.setattr(S.Staging, "__exit__", close_as_killed)
        with pytest.raises(KeyboardInterrupt):
            ptq(*words)


def close_as_killed(self, *_error):
    """The lock goes, all else stays."""
    self.close()


def test_a_kill_before_the_name(job, monkeypatch):
    words, whole, out = job
    stopped(monkeypatch, [*words, out], when="before the name")
    partial = Path(f"{out}.partial")
    inode = (partial / "out/model.safetensors").stat().st_ino
    assert ptq(*words, out).code == 0
    assert tree(out) == whole
    assert (out / "model.safetensors").stat().st_ino == inode
    assert not partial.exists()


def test_an_output_that_was_moved_is_not_written_to_again(job, monkeypatch):
    """Killed after the name was given: the units in the work folder lie in files that are gone."""
    words, whole, out = job
    stopped(monkeypatch, [*words, out], when="after the name")
    moved = out.with_name("moved")
    out.rename(moved)
    inode = (moved / "model.safetensors").stat().st_ino
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[-1] ^= 1  # its owner's business
    (moved / "model.safetensors").write_bytes(content)
    assert ptq(*words, out).code == 0
    assert tree(out) == whole
    assert (out / "model.safetensors").stat().st_ino != inode
    assert (moved / "model.safetensors").read_bytes() == content


# ---- file systems that cannot swap two names (NFS, most of FUSE) ----


@pytest.fixture
def no_exchange(monkeypatch):
    def refused(first, second):
        with files.named(second):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(files, "exchange", refused)


def older(out, name="quantization.json"):
    out.mkdir()
    (out / name).write_text("old")


@pytest.mark.usefixtures("no_exchange")
def test_force_without_exchange(job):
    words, whole, out = job
    older(out)
    assert ptq(*words, out, "--force").code == 0
    assert tree(out) == whole
    assert sorted(p.name for p in out.parent.glob("out*")) == ["out"]


@pytest.mark.usefixtures("no_exchange")
def test_force_without_exchange_replaces_a_file_in_one_step(tmp_path):
    model, acts = small_job(tmp_path)
    out = tmp_path / "c.safetensors"
    words = ["calibrate", model, "--activations", acts, "-o"]
    assert ptq(*words, tmp_path / "whole").code == 0
    out.write_text("old")
    assert ptq(*words, out, "--force").code == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("force", [True, False])
def test_a_kill_while_the_older_output_is_aside(job, monkeypatch, force):
    words, whole, out = job
    older(out)
    rename = os.rename

    def killed(source, target, **options):
        if str(target) == str(out):
            raise KeyboardInterrupt
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr(S.Staging, "__exit__", close_as_killed)
        with pytest.raises(KeyboardInterrupt):
            ptq(*words, out, "--force")
    assert not out.exists()
    outcome = ptq(*words, out, *(["--force"] if force else []))
    if force:
        assert outcome.code == 0, outcome.err
        assert tree(out) == whole
        assert not Path(f"{out}.partial").exists()
    else:  # the older output is back, and as it was
        assert "exists already" in outcome.errors[0]
        assert tree(out) == {"quantization.json": b"old"}


@pytest.mark.usefixtures("no_exchange")
def test_an_error_while_the_older_output_is_aside_brings_it_back(job, monkeypatch):
    words, _, out = job
    older(out)
    rename, failed = os.rename, []

    def failing(source, target, **options):
        if str(target) == str(out) and not failed:
            failed.append(target)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        outcome = ptq(*words, out, "--force")
    assert outcome.code == 1
    assert failed
    assert tree(out) == {"quantization.json": b"old"}
