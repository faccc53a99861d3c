"""A Dask cluster of real processes: the same bytes, one worker killed in the middle, and resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ptq_cli.calibration import from_activations
from ptq_cli.run import workers
from ptq_cli.storage.units import UnitStore
from tests.builders import ROOT, SAMPLE, ptq, tree
from tests.stopping import STAGED, TOLD, end_here, stop_at, stopped

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

MODEL = SAMPLE / "model.safetensors"


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes that find this package; nothing else is shared but disks."""
    distributed = pytest.importorskip("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster:
            yield cluster


def test_two_workers_of_a_cluster_give_the_same_bytes(tmp_path, cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the workers' current folder is another: paths must travel
    (tmp_path / "in").symlink_to(SAMPLE)
    for words in (["gptq", "in/model.safetensors"], ["calibrate", "in/model.safetensors"]):
        assert ptq(*words, "-o", "one", "--workers", 1).code == 0
        outcome = ptq(*words, "-o", "many", "--scheduler", cluster.scheduler_address)
        assert outcome.code == 0, outcome.err
        one, many = Path("one"), Path("many")
        if one.is_dir():
            assert tree(one) == tree(many)
        else:
            assert one.read_bytes() == many.read_bytes()
        for path in (one, many):
            path.rename(f"{path}-{words[0]}")


def test_parts_of_a_site_are_summed_by_all_workers_with_the_same_bytes(
    tmp_path, cluster, monkeypatch
):
    """The cut travels with the work: the workers' own constant is another."""
    monkeypatch.setattr(from_activations, "PART_TOKENS", 300)
    words = ["calibrate", MODEL, "-o"]
    assert ptq(*words, tmp_path / "one", "--workers", 1).code == 0
    outcome = ptq(*words, tmp_path / "many", "--scheduler", cluster.scheduler_address)
    assert outcome.code == 0, outcome.err
    one = (tmp_path / "one").read_bytes()
    assert one == (tmp_path / "many").read_bytes()
    monkeypatch.undo()
    assert ptq(*words, tmp_path / "uncut", "--workers", 1).code == 0
    assert one != (tmp_path / "uncut").read_bytes()


def test_a_dry_run_asks_the_cluster(tmp_path, cluster, monkeypatch):
    words = ("gptq", MODEL, "-o", tmp_path / "out", "--dry-run", "--json", "--scheduler")
    outcome = ptq(*words, cluster.scheduler_address)
    assert outcome.code == 0, outcome.err
    assert outcome.document["memory"]["workers"] == 2
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 0.5)
    assert ptq(*words, "tcp://127.0.0.1:1").code == 1


def test_a_worker_that_is_killed_is_survived(tmp_path, cluster):
    """In the middle of its third unit, as by the kernel; the unit is done again."""
    assert ptq("gptq", MODEL, "-o", tmp_path / "one", "--workers", 1).code == 0
    import distributed

    with distributed.Client(cluster, set_as_default=False) as client:
        victim = next(iter(cluster.workers.values()))
        pid = victim.pid
        client.run(stop_at, STAGED, 3, end_here, workers=[victim.worker_address])
    address = cluster.scheduler_address
    outcome = ptq("gptq", MODEL, "-o", tmp_path / "many", "--scheduler", address)
    assert outcome.code == 0, outcome.err
    assert victim.pid != pid  # another was started in its place
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_interrupted_on_the_cluster_and_gone_on_with_here(tmp_path, cluster):
    arguments = ["gptq", MODEL, "-o", tmp_path / "o"]
    code, err = stopped(TOLD, 3, "SIGINT", *arguments, "--scheduler", cluster.scheduler_address)
    assert code == 130, err
    assert "Traceback" not in err
    assert ptq(*arguments, "--workers", 2).code == 0
    assert ptq(*arguments[:-1], tmp_path / "p", "--workers", 1).code == 0
    assert tree(tmp_path / "o") == tree(tmp_path / "p")


def test_interrupted_here_and_gone_on_with_on_the_cluster(tmp_path, cluster, monkeypatch):
    """Units that lie in their places already, and units that the cluster stages, side by side."""
    arguments = ["gptq", MODEL, "-o", tmp_path / "o"]
    put, kept = UnitStore.put, []

    def stop(self, unit, *rest, **options):
        if len(kept) == 5:
            raise KeyboardInterrupt
        put(self, unit, *rest, **options)
        kept.append(unit)

    with monkeypatch.context() as patch:
        patch.setattr(UnitStore, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            ptq(*arguments, "--workers", 1)
    outcome = ptq(*arguments, "--scheduler", cluster.scheduler_address)
    assert outcome.code == 0, outcome.err
    assert "kept from the interrupted run" in "".join(outcome.progress)
    assert ptq("gptq", MODEL, "-o", tmp_path / "p", "--workers", 1).code == 0
    assert tree(tmp_path / "o") == tree(tmp_path / "p")


def test_no_scheduler_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 0.5)
    outcome = ptq("gptq", MODEL, "-o", tmp_path / "o", "--scheduler", "tcp://127.0.0.1:9")
    assert outcome.code == 1
    assert "no Dask scheduler answers" in outcome.errors[0]
    assert os.listdir(tmp_path) == []
