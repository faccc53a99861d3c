"""The order of tasks, their memory, their failures; and workers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from ptq_cli.errors import FileError, InputError, NumericalError
from ptq_cli.run.schedule import Task, absolute, run_tasks
from ptq_cli.run.workers import Crew, InProcess, ProcessPool, WorkerLost
from tests.builders import ROOT


class AtOnce(Executor):
    """Does nothing, at once; remembers the order."""

    def __init__(self):
        self.order = []

    def submit(self, fn, /, function, argument, threads):
        self.order.append((argument, threads))
        future = Future()
        future.set_result(argument)
        return future


def tasks(*sizes):
    return [Task(f"t{i}", size, str, size) for i, size in enumerate(sizes)]


def test_the_largest_come_first_and_one_too_big_runs_alone_with_all_threads():
    executor = AtOnce()
    done = []
    crew = Crew(executor, 4, lambda: None)
    run_tasks(tasks(3, 9, 60, 5, 7), crew, 20, lambda task, result: done.append(task.name))
    assert executor.order == [(60, 4), (9, 1), (7, 1), (3, 1), (5, 4)]
    assert sorted(done) == ["t0", "t1", "t2", "t3", "t4"]


class Recorder(Executor):
    """Holds every task until told; remembers what ran together."""

    def __init__(self):
        self.together = []
        self.running = {}

    def submit(self, fn, /, function, argument, threads):
        future = Future()
        self.running[future] = argument
        self.together.append(sorted(self.running.values()))
        return future


def test_memory_bounds_what_runs_together(monkeypatch):
    from ptq_cli.run import schedule as module

    executor = Recorder()

    def finish_one(running, return_when):
        future = next(iter(executor.running))
        future.set_result(executor.running.pop(future))
        return type("Waited", (), {"done": {future}})

    monkeypatch.setattr(module, "wait", finish_one)
    run_tasks(tasks(6, 6, 6, 2, 2, 2), Crew(executor, 8, lambda: None), 10)
    assert max(sum(sizes) for sizes in executor.together) <= 10
    assert max(len(sizes) for sizes in executor.together) > 1


def fail(which):
    if which != "good":
        raise {"bad": InputError("bad tensor"), "worse": NumericalError("worse")}[which]
    return which


def test_a_failure_is_named_and_the_others_finish():
    done = []
    names = [Task(word, 1, fail, word) for word in ("worse", "good", "bad")]
    with pytest.raises(NumericalError, match=r"worse; 1 more failed: bad"):
        run_tasks(names, Crew(InProcess(), 1, lambda: None), 9, lambda t, r: done.append(t.name))
    assert done == ["good"]


def full(which):
    raise FileError("no space")


def test_a_full_disk_stops_at_once():
    seen = []

    def count(word):
        seen.append(word)
        return full(word)

    with pytest.raises(FileError):
        run_tasks([Task(w, 1, count, w) for w in "abc"], Crew(InProcess(), 1, lambda: None), 9)
    assert seen == ["a"]


def die_once(marker):
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_task_done_again(tmp_path):
    pool = ProcessPool(2)
    try:
        crew = Crew(pool, 2, pool.stop)
        results = []
        both = [Task("a", 1, die_once, str(tmp_path / "a")), Task("b", 1, fail, "good")]
        run_tasks(both, crew, 9, lambda task, result: results.append(result))
        assert sorted(results) == ["done", "good"]
        with pytest.raises(WorkerLost, match=r"unit c: its worker process ended .* \(signal 9\)"):
            run_tasks([Task("unit c", 1, die, None)], crew, 9)
    finally:
        pool.stop()


def test_an_error_travels_and_what_cannot_travel_is_told():
    pool = ProcessPool(1)
    try:
        crew = Crew(pool, 2, pool.stop)
        with pytest.raises(InputError, match="x: bad tensor"):
            run_tasks([Task("x", 1, fail, "bad")], crew, 9)
        with pytest.raises(Exception, match="pickle"):
            run_tasks([Task("x", 1, lambda _: 0, 0)], crew, 9)
    finally:
        pool.stop()


def test_workers_die_with_a_runner_that_is_killed(tmp_path):
    script = textwrap.dedent("""
        import os, signal
        from ptq_cli.run.workers import ProcessPool
        pool = ProcessPool(1)
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(signal.pause)
        signal.pause()
    """)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runner = subprocess.Popen([sys.executable, "-c", script], text=True, env=env, **pipes)
    worker = int(runner.stdout.readline())
    runner.kill()
    try:
        runner.communicate(timeout=60)  # the worker holds stderr too: its end is the worker's
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker lives on")


def test_paths_are_made_absolute_for_workers_elsewhere(monkeypatch, tmp_path):
    from ptq_cli.storage.units import UnitStore

    monkeypatch.chdir(tmp_path)
    there = absolute({"a": (UnitStore(Path("x")), Path("y"), 1)})
    assert there == {"a": (UnitStore(tmp_path / "x"), tmp_path / "y", 1)}
