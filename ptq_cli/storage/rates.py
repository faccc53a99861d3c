"""How fast this machine is right now, measured in half a second: enough for an estimate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ptq_cli.errors import PtqError
from ptq_cli.storage.files import read_into

_SIDE = 768  # of the matrices that are multiplied: they fit a core's cache, as the engine's do
_VALUES = 1 << 17  # what the engine works on at a time
_PIECE = 4 << 20


@dataclass(frozen=True)
class Rates:
    """What all threads together do in a second.

    products: multiply-adds in products of float32 matrices
    passes: float32 values that an elementwise operation reads and writes
    calls: operations on next to nothing
    read: bytes read from the model's files, which may lie in the machine's memory already
    """

    products: float
    passes: float
    calls: float
    read: float


def measure(files: Sequence[Path], threads: int, seconds: float = 0.5) -> Rates:
    """Measure the machine for about `seconds`, on so many threads, as the run would use them."""
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:

        def rate(work: Callable[[float], float], share: float) -> float:
            return sum(pool.map(work, [share * seconds] * threads))

        calls = _calls(0.1 * seconds) * threads
        read = _read(files, 0.1 * seconds)
        return Rates(rate(_products, 0.4), rate(_passes, 0.4), calls, read)


def _repeated(step: Callable[[], float], seconds: float) -> float:
    """What `step` does in a second; the first step warms the caches."""
    step()
    done, begin = 0.0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds or not done:
        done += step()
    return done / spent


def _products(seconds: float) -> float:
    left = np.full((_SIDE, _SIDE), 0.5, np.float32)
    result = np.empty_like(left)

    def step() -> float:
        np.matmul(left, left, out=result)
        return float(_SIDE) ** 3

    return _repeated(step, seconds)


def _passes(seconds: float) -> float:
    values = np.full(_VALUES, 0.5, np.float32)
    result = np.empty_like(values)

    def step() -> float:
        np.multiply(values, values, out=result)
        np.rint(result, out=result)
        return 2.0 * _VALUES

    return _repeated(step, seconds)


def _calls(seconds: float) -> float:
    """On one thread: threads of one interpreter would wait for one another, processes do not."""
    values = np.full(16, 0.5, np.float32)

    def step() -> float:
        for _ in range(100):
            np.multiply(values, values, out=values)
        return 100.0

    return _repeated(step, seconds)


def _read(files: Sequence[Path], seconds: float) -> float:
    """From the start of the largest file on; infinite where nothing can be read (the run will say
    why)."""
    buffer = np.empty(_PIECE, np.uint8)
    try:
        largest = max(files, key=lambda path: path.stat().st_size)
        pieces = largest.stat().st_size // _PIECE
        done, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < seconds and done < pieces:
            read_into(largest, done * _PIECE, buffer)
            done += 1
    except (OSError, ValueError, PtqError):
        return float("inf")
    return done * _PIECE / spent if done else float("inf")
