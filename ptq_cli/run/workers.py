"""Where units are worked on: in this process, in processes of this machine, or on a Dask cluster.

All three are `concurrent.futures` executors, so the runner knows no difference. Local processes are
started with one BLAS thread each, never see Ctrl-C (the terminal sends it to everybody; only the
runner answers it), and die with the runner even where it is killed.

They are not made by `multiprocessing`: that would run a caller's unguarded script again in every
worker, and a worker that is killed would take the whole pool with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ptq_cli.errors import InputError, PtqError, import_extra

ATTEMPTS = 2
_BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

# Pages that one unit gives back serve the next; the C library would return them to the system. Huge
# ones are filled faster.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}

ANSWER_SECONDS = 10.0  # a scheduler that does not answer is asked again and again for so long


class WorkerLost(PtqError):
    """A worker ended without an answer (killed, most likely for lack of memory)."""


@dataclass(frozen=True)
class Crew:
    """An executor, how many units it works on at once, and how to stop it without waiting.

    memory: bytes it has for them, where that is not this machine's
    remote: whether its workers run elsewhere, and need absolute paths
    """

    executor: Executor
    size: int
    stop: Callable[[], None]
    memory: int | None = None
    remote: bool = False


@contextmanager
def hire(workers: int, scheduler: str | None = None) -> Iterator[Crew]:
    """The crew for a run. Whatever happens, no local process outlives the block.

    Raises:
        InputError: the scheduler is not there, or `distributed` is not installed.
    """
    if scheduler is not None:
        crew = _cluster(scheduler)
    elif workers <= 1:
        crew = Crew(InProcess(), 1, lambda: None)
    else:
        pool = ProcessPool(workers)
        crew = Crew(pool, workers, pool.stop)
    try:
        yield crew
    finally:
        crew.stop()


class InProcess(Executor):
    """Works at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class ProcessPool(Executor):
    """Processes of this machine, each started when there is work for it, and anew where it died.
    Each has a thread of its own that hands it one task after the other."""

    def __init__(self, count: int) -> None:
        # Processes inherit the blocked signals of the thread that starts them.
        blocked = (signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        self._threads = ThreadPoolExecutor(count, "", signal.pthread_sigmask, blocked)
        self._own = threading.local()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._threads.submit(self._ask, fn, args)

    def _ask(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Have the thread's process do a task, and a new one if that dies."""
        lost = ""
        for _ in range(ATTEMPTS):
            worker: _Worker | None = getattr(self._own, "worker", None)
            try:
                worker = self._own.worker = worker or self._start()
                worker.line.send((fn, args))
                answer, error = worker.line.recv()
            except (OSError, EOFError) as failure:
                lost = str(failure) if worker is None else self._end(worker)
                self._own.worker = None
                continue
            if error is not None:
                raise error
            return answer
        raise WorkerLost(
            f"its worker process ended {ATTEMPTS} times without an answer ({lost})",
            hint="if memory ran out, lower --workers or --max-memory",
        )

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._stopped:
                raise EOFError
            numbers = [str(theirs.fileno()), str(os.getpid())]
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ptq_cli.run.worker", *numbers],
                env=_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            self._processes.add(process)
        return _Worker(process, Connection(ours.detach()))

    def _end(self, worker: _Worker) -> str:
        """See a process out; how it ended, in words."""
        worker.line.close()
        worker.process.kill()
        code = worker.process.wait()
        self._processes.discard(worker.process)
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """End every process at once; work in hand is lost, files are whole or absent."""
        self._stopped = True
        with self._lock:
            for process in list(self._processes):
                process.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self._processes):
            process.wait()


@dataclass(frozen=True)
class _Worker:
    """A process and the line to it."""

    process: subprocess.Popen[bytes]
    line: Connection


def _environment() -> dict[str, str]:
    """One BLAS thread from the start, and modules found where this process finds them."""
    paths = [path or os.getcwd() for path in sys.path]
    one = dict.fromkeys(_BLAS_THREADS, "1")
    return {**KEEP_MEMORY, **os.environ, **one, "PYTHONPATH": os.pathsep.join(paths)}


def _cluster(address: str) -> Crew:
    """A Dask cluster's workers, one unit a worker at a time; a lost worker's unit is done again."""
    distributed = import_extra("distributed", "--scheduler", "distributed", "Dask")
    try:
        client = distributed.Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(f"{address}: no Dask scheduler answers: {error}") from None
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if not workers:
        client.close()
        raise InputError(f"{address}: this scheduler has no workers", hint="start dask worker")
    limits = [int(worker["memory_limit"] or 0) for worker in workers.values()]
    memory = sum(limits) * 3 // 4 if all(limits) else None
    executor = client.get_executor(pure=False, retries=0)

    def stop() -> None:
        # What breaks off is meant to. (Dask gives tornado.application a level of its own.)
        for name in ("distributed", "tornado", "tornado.application", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        with contextlib.suppress(Exception):
            client.close(timeout=5)

    return Crew(executor, len(workers), stop, memory, remote=True)
