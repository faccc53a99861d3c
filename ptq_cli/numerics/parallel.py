"""Independent pieces of one computation, on the threads there are.

The caller of the mathematics says how many (`use_threads`); the mathematics says what is
independent (`each`). Pieces are cut without regard to that number and their results come back in
order, so no bit depends on it. numpy releases the interpreter's lock in products and elementwise
loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from math import ceil
from typing import TypeVar

PIECE_ELEMENTS = 1 << 17  # of a matrix, worked on at a time

T = TypeVar("T")
R = TypeVar("R")

_executor: ContextVar[ThreadPoolExecutor | None] = ContextVar("executor", default=None)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let `each` use that many threads inside the block."""
    if count <= 1:
        yield
        return
    with ThreadPoolExecutor(count) as executor:
        token = _executor.set(executor)
        try:
            yield
        finally:
            _executor.reset(token)


def each(function: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """`[function(piece) for piece in pieces]`; pieces must not call `each` themselves."""
    executor = _executor.get()
    if executor is None:
        return [function(piece) for piece in pieces]
    return list(executor.map(function, pieces))


def pieces(start: int, stop: int, columns: int, elements: int = PIECE_ELEMENTS) -> list[slice]:
    """Rows start … stop−1, a few at a time: what is done with them stays in the cache."""
    return strips(stop, max(1, elements // max(1, columns)), start)


def equal_strips(stop: int, most: int) -> list[slice]:
    """Rows or columns 0 … stop−1 in strips of one length, as few as are at most `most` long."""
    count = max(1, ceil(stop / most))
    return strips(stop, max(1, ceil(stop / count)))


def strips(stop: int, step: int, start: int = 0) -> list[slice]:
    """Rows or columns start … stop−1, `step` at a time."""
    return [slice(top, min(stop, top + step)) for top in range(start, stop, step)]
