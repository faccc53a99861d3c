"""Independent tasks on a crew: the largest first, as many as memory allows, each named where it
fails.

A task is a function with a small argument, names and settings, and gives back little: files hold
the rest. A task that takes more memory than there is runs alone. Where fewer tasks are left than
the crew has members, each gets threads of the idle ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli.core.names import fold_names
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.errors import FileError, PtqError
from ptq_cli.numerics.parallel import use_threads
from ptq_cli.run.workers import Crew, WorkerLost
from ptq_cli.storage import interruption
from ptq_cli.storage.folder import MAX_SHARD
from ptq_cli.storage.machine import cores, memory_available, parse_size
from ptq_cli.storage.units import ChangedInput


@dataclass(frozen=True)
class Resources:
    """What a run may use. None: what there is.

    workers: processes at work; max_memory: bytes for the units in flight
    scheduler: address of a Dask scheduler whose workers do the work instead
    """

    workers: int | None = None
    max_memory: int | None = None
    scheduler: str | None = None

    def crew_for(self, most: int) -> int:
        """The workers asked for; else the cores there are, but not more than `most`."""
        return min(cores(), most) if self.workers is None else self.workers

    @property
    def memory(self) -> int:
        return memory_available() * 3 // 4 if self.max_memory is None else self.max_memory

    def memory_of(self, crew: Crew) -> int:
        """Bytes for the units in flight: a cluster's own memory where nothing was asked for."""
        asked = self.max_memory is not None or crew.memory is None
        return self.memory if asked or crew.memory is None else crew.memory


ALL_THERE_IS = Resources()
THIS_PROCESS = Resources(workers=1)


@dataclass(frozen=True)
class RunOptions:
    """What a run is given besides its plan.

    max_shard: bytes of tensors in one weights file
    force: replace an existing output; restart: drop an interrupted run's work
    """

    resources: Resources = ALL_THERE_IS
    max_shard: int = MAX_SHARD
    listen: Listener = nobody
    force: bool = False
    restart: bool = False


def take_resources(options: dict[str, Any]) -> Resources:
    """Take `workers`, `max_memory` (bytes, or words like 2GiB) and `scheduler` out of `options`."""
    workers, memory = options.pop("workers", None), options.pop("max_memory", None)
    size = None if memory is None else parse_size(str(memory))
    return Resources(workers, size, options.pop("scheduler", None))


@dataclass(frozen=True)
class Task:
    """One piece of work: `function(argument)`, which needs `memory` bytes."""

    name: str
    memory: int
    function: Callable[[Any], Any]
    argument: Any


def run_tasks(
    tasks: Sequence[Task],
    crew: Crew,
    memory: int,
    done: Callable[[Task, Any], Iterable[Task] | None] = lambda task, result: None,
    *,
    in_order: bool = False,
) -> None:
    """Work through the tasks; `done` hears of each, and gives those that can follow: they come
    before all others.

    in_order: one after the other as they stand, else the largest first

    Raises:
        PtqError: a task failed; the others were finished first, unless none could have done
            better (no space, another input than before, a crew that dies).
    """
    pending = list(tasks) if in_order else sorted(tasks, key=lambda task: -task.memory)
    running: dict[Future[Any], Task] = {}
    order = [task.name for task in tasks]
    failed: dict[str, PtqError] = {}
    hopeless = False
    while pending or running:
        _start(pending, running, crew, memory)
        finished = wait(running, return_when=FIRST_COMPLETED).done
        interruption.check()
        for future in finished:
            task = running.pop(future)
            try:
                follow = done(task, _result(future, crew)) or ()
                pending[:0] = () if hopeless else follow
            except PtqError as error:
                failed[task.name] = error
                if isinstance(error, FileError | ChangedInput | WorkerLost):
                    hopeless = True
                    pending.clear()
    if failed:
        raise _first(failed, [*order, *(name for name in failed if name not in order)])


def _start(pending: list[Task], running: dict[Future[Any], Task], crew: Crew, memory: int) -> None:
    """Start what fits, the largest first."""
    used = sum(task.memory for task in running.values())
    for task in list(pending):
        if len(running) >= crew.size:
            return
        alone = task.memory > memory
        if running and (alone or used + task.memory > memory):
            continue
        pending.remove(task)
        beside = 1 if alone else min(crew.size, len(pending) + len(running) + 1)
        threads = crew.size // beside
        argument = absolute(task.argument) if crew.remote else task.argument
        running[crew.executor.submit(call, task.function, argument, threads)] = task
        used += task.memory
        if crew.size == 1:
            return


def _result(future: Future[Any], crew: Crew) -> Any:
    try:
        return future.result()
    except PtqError:
        raise
    except Exception as error:
        if crew.remote and type(error).__module__.startswith("distributed"):
            raise WorkerLost(f"the cluster lost it: {error}") from None
        raise


def _first(failed: Mapping[str, PtqError], order: Sequence[str]) -> PtqError:
    """The first failure in the order of the tasks, with the names of the others."""
    names = [name for name in order if name in failed]
    error = failed[names[0]]
    if names[0] not in error.message:
        error.message = f"{names[0]}: {error.message}"
    if len(names) > 1:
        error.message += f"; {len(names) - 1} more failed: {fold_names(names[1:])}"
    return error


def call(function: Callable[[Any], Any], argument: Any, threads: int) -> Any:
    """What a worker does with a task."""
    _pin_blas()
    with use_threads(threads):
        return function(argument)


@cache
def _pin_blas() -> None:
    """One BLAS thread for good. (In the runner's own process `run` gives them back.)"""
    threadpool_limits(1)


def absolute(value: Any) -> Any:
    """The same value with absolute paths: a worker elsewhere has another current folder."""
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, tuple):
        return tuple(map(absolute, value)) if type(value) is tuple else value
    if isinstance(value, dict):
        return {key: absolute(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: absolute(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
