"""The work folder: locked, resumed, never believed, and gone at the end."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.errors import PtqError
from ptq_cli.storage.output import Target
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_bytes
from tests.builders import ptq, random_weight, small_job, small_model
from tests.stopping import STAGED, killed

JOB = {"command": "test", "bits": 4, "ignore": ("a", "b")}
VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def opened(**options):
    return Staging(Target(Path("out"), options.pop("job", JOB), **options))


def put(staging, unit="unit"):
    staging.put(unit, [as_bytes("w", VALUES), as_bytes("z", VALUES[:0])], {"rel_err": 0.5})


def interrupted(*units):
    """What a run that was killed leaves behind."""
    staging = opened()
    for unit in units:
        put(staging, unit)
    staging.close()


# ---- units ----


def test_a_finished_unit_comes_back_as_it_was():
    interrupted("unit", "../x", "/etc/passwd", "y" * 10_000, "\x1b")
    staging = opened()
    assert staging.resumed
    for unit in ("unit", "../x", "/etc/passwd", "y" * 10_000, "\x1b"):
        assert staging.finished(unit)
        assert staging.store.result(unit) == {"rel_err": 0.5}
        w, z = staging.store.tensors(unit)
        assert w.data.tobytes() == VALUES.tobytes()
        assert (w.spec.shape, z.spec.shape) == ((3, 4), (0, 4))
    assert not staging.finished("another")
    assert os.listdir() == ["out.partial"]
    staging.close()


def entry_of(suffix):
    (path,) = Path("out.partial/units").glob(f"*{suffix}")
    return path


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edited(change):
    path = entry_of(".json")
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))


DAMAGE = {
    "first bit": lambda: flipped(entry_of(".bin"), 0),
    "last bit": lambda: flipped(entry_of(".bin"), -1),
    "cut": lambda: os.truncate(entry_of(".bin"), 20),
    "longer": lambda: entry_of(".bin").write_bytes(entry_of(".bin").read_bytes() + b"\0"),
    "no data": lambda: entry_of(".bin").unlink(),
    "no entry": lambda: entry_of(".json").unlink(),
    "entry cut": lambda: os.truncate(entry_of(".json"), 30),
    "entry empty": lambda: os.truncate(entry_of(".json"), 0),
    "entry a list": lambda: entry_of(".json").write_text("[]"),
    "entry a number": lambda: entry_of(".json").write_text("5"),
    "entry nested": lambda: entry_of(".json").write_text("[" * 100_000),
    "result edited": lambda: edited(lambda e: e["result"].update(rel_err=0.0)),
    "shape edited": lambda: edited(lambda e: e["tensors"][0].__setitem__(2, [4, 3])),
    "dtype edited": lambda: edited(lambda e: e["tensors"][0].__setitem__(1, "I32")),
    "dtype unknown": lambda: edited(lambda e: e["tensors"][0].__setitem__(1, "X")),
    "unit edited": lambda: edited(lambda e: e.update(unit="other")),
    "no checksum": lambda: edited(lambda e: e.pop("sha256")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_torn_or_edited_unit_is_not_finished(damage):
    interrupted("unit")
    damage()
    staging = opened()
    assert not staging.finished("unit")
    put(staging)
    assert staging.finished("unit")
    staging.close()


def test_one_units_files_do_not_serve_another():
    interrupted("one")
    (data,), (entry,) = (list(Path("out.partial/units").glob(f"*{s}")) for s in (".bin", ".json"))
    staging = opened()
    target = staging.store.path("two", ".bin")
    data.rename(target)
    entry.rename(target.with_suffix(".json"))
    assert not staging.finished("two")
    staging.close()


# ---- runs ----


def test_a_second_run_is_kept_out():
    first = opened()
    with pytest.raises(PtqError, match="another run is working"):
        opened()
    with pytest.raises(PtqError, match="another run is working"):
        opened(restart=True)
    first.close()
    opened().close()


def test_a_run_that_is_kept_out_leaves_the_others_empty_folder():
    """Two runs that began together: one held the lock, the other removed the folder under it."""
    os.mkdir("out.partial")
    other = os.open("out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(PtqError, match="another run is working"):
        opened()
    assert os.path.isdir("out.partial")
    os.close(other)
    opened().close()


def test_other_settings_are_refused_and_named():
    interrupted("unit")
    job = {**JOB, "bits": 3, "extra": 1}
    with pytest.raises(PtqError, match=r"other bits, extra\n--restart"):
        opened(job=job)
    staging = opened()  # the work is still there
    assert staging.finished("unit")
    staging.close()
    staging = opened(job=job, restart=True)
    assert not staging.resumed
    assert not staging.finished("unit")
    staging.close()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 1}'])
def test_a_damaged_job_is_an_error_that_restart_mends(content):
    interrupted("unit")
    Path("out.partial/job.json").write_text(content)
    with pytest.raises(PtqError, match=r"job\.json"):
        opened()
    staging = opened(restart=True)
    assert not staging.finished("unit")
    staging.close()


def test_work_without_a_job_is_begun_anew():
    interrupted("unit")
    Path("out.partial/job.json").unlink()
    staging = opened()
    assert not staging.finished("unit")
    staging.close()


# ---- publishing ----


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_output_gets_its_name_and_the_work_goes(kind):
    staging = opened()
    if kind == "file":
        staging.out.write_text("new")
    else:
        staging.out.mkdir()
        (staging.out / "a").write_text("new")
    staging.publish()
    assert os.listdir() == ["out"]
    assert Path("out" if kind == "file" else "out/a").read_text() == "new"


def test_force_replaces_no_folder_that_another_made():
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    with pytest.raises(PtqError, match="did not write"):
        opened(force=True)
    assert os.listdir("out") == ["thesis.tex"]


def test_force_exchanges_old_and_new():
    Path("out").mkdir()
    Path("out/old").write_text("old")
    Path("out/quantization.json").write_text("{}")
    with pytest.raises(PtqError, match="exists"):
        opened()
    staging = opened(force=True)
    assert Path("out/old").exists()
    staging.out.mkdir()
    (staging.out / "new").write_text("new")
    staging.publish()
    assert os.listdir() == ["out"]
    assert sorted(os.listdir("out")) == ["new", "ptq_job.json"]


def test_an_output_that_came_in_between_is_not_replaced():
    staging = opened()
    staging.out.mkdir()
    Path("out").mkdir()
    Path("out/mine").write_text("mine")
    with pytest.raises(PtqError, match="exists"):
        staging.publish()
    assert Path("out/mine").exists()
    staging.close()


# ---- kills ----


def test_finished_units_are_not_done_again(tmp_path, monkeypatch):
    from ptq_cli.run import unit_job

    model, activations = small_job(tmp_path)
    done = []
    work = unit_job.quantize_unit

    def interrupt(unit, *rest, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit.name)
        return work(unit, *rest, **options)

    monkeypatch.setattr(unit_job, "quantize_unit", interrupt)
    arguments = ["gptq", model, "--activations", activations, "-o", "out"]
    with pytest.raises(KeyboardInterrupt):
        ptq(*arguments)
    assert Path("out.partial/job.json").is_file()
    redone = []

    def count(unit, *rest, **options):
        redone.append(unit.name)
        return work(unit, *rest, **options)

    monkeypatch.setattr(unit_job, "quantize_unit", count)
    refused = ptq(*arguments, "--bits", 3)
    assert refused.code == 1
    assert "other bits" in refused.errors[0]
    assert redone == []
    assert ptq(*arguments).code == 0
    assert len(redone) == 1
    assert set(redone).isdisjoint(done)


def test_an_interrupted_run_does_not_go_on_with_another_model(tmp_path):
    model, activations = small_job(tmp_path)
    arguments = ["gptq", model, "--activations", activations, "-o", "out"]
    killed(STAGED, 3, *arguments)
    small_model(model, **{"layers.0.q_proj.weight": random_weight(12, 32, seed=77)})
    outcome = ptq(*arguments)
    assert outcome.code == 1
    assert "other model" in outcome.errors[0]
    assert ptq(*arguments, "--restart").code == 0
