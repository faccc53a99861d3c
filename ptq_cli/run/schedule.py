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
from ptq_cli.errors import FileError, PtqError, stated_in
from ptq_cli.numerics.parallel import use_threads
from ptq_cli.run.workers import Crew, WorkerLost
from ptq_cli.storage import interruption
from ptq_cli.storage.machine import cores, memory_to_use, parse_size
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
        return memory_to_use() if self.max_memory is None else self.max_memory

    def memory_of(self, crew: Crew) -> int:
        """Bytes for the units in flight: a cluster's own memory where nothing was asked for."""
        if self.max_memory is None and crew.memory is not None:
            return crew.memory
        return self.memory


ALL_THERE_IS = Resources()


@dataclass(frozen=True)
class RunOptions:
    """What a run is given besides its plan.

    max_shard: bytes of tensors in one weights file; None: the container's usual
    force: replace an existing output; restart: drop an interrupted run's work
    """

    resources: Resources = ALL_THERE_IS
    max_shard: int | None = None
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
) -> None:
    """Work through the tasks, the largest first; `done` hears of each, and gives those that can
    follow: they come before all others.

    Raises:
        PtqError: a task failed; the others were finished first, unless none could have done
            better (no space, another input than before, a crew that dies).
    """
    pending = sorted(tasks, key=lambda task: -task.memory)
    running: dict[Future[Any], Task] = {}
    failed: dict[str, PtqError] = {}
    hopeless = False
    while pending or running:
        _start(pending, running, crew, memory)
        finished = wait(running, return_when=FIRST_COMPLETED).done
        interruption.check()
        for future in finished:
            task = running.pop(future)
            try:
                with stated_in(task.name):
                    follow = done(task, _result(future, crew)) or ()
                pending[:0] = () if hopeless else follow
            except PtqError as error:
                failed[task.name] = error
                if isinstance(error, FileError | ChangedInput | WorkerLost):
                    hopeless = True
                    pending.clear()
    if failed:
        raise _first(failed, [task.name for task in tasks])


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


def _result(future: Future[Any], crew: Crew) -> Any:
    try:
        return future.result()
    except Exception as error:
        if crew.remote and type(error).__module__.startswith("distributed"):
            raise WorkerLost(f"the cluster lost it: {error}") from None
        raise


def _first(failed: Mapping[str, PtqError], order: Sequence[str]) -> PtqError:
    """The first failure in the order of the tasks, with the names of the others; those that
    followed some come last."""
    place = {name: number for number, name in enumerate(order)}
    first, *others = sorted(failed, key=lambda name: place.get(name, len(place)))
    if others:
        failed[first].message += f"; {len(others)} more failed: {fold_names(others)}"
    return failed[first]


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
