"""Finished tensors go to their places in the output while others are still being worked on.

One thread copies, so that the disk is busy from the beginning and nothing is left to write at the
end but headers. It holds no work that could be lost: what it has not copied is copied at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from ptq_cli.storage.checkpoint import StoredTensor
from ptq_cli.storage.shards import Shards
from ptq_cli.storage.tensors import Bytes

Tensors = Iterable[Bytes | StoredTensor]


class Copying:
    """Copies into `shards` in the background; without them it does nothing."""

    def __init__(self, shards: Shards | None) -> None:
        self._shards = shards
        self._thread = ThreadPoolExecutor(1)
        self._running: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self.check()

    def put(self, tensors: Callable[[], Tensors]) -> None:
        """Have tensors copied; the thread asks for them. Raises FileError of an earlier copy."""
        self.check()
        if self._shards is not None:
            self._running.append(self._thread.submit(self._copy, self._shards, tensors))

    @staticmethod
    def _copy(shards: Shards, tensors: Callable[[], Tensors]) -> None:
        shards.put(tensors())

    def check(self) -> None:
        """Raises what a copy met."""
        waiting = []
        for future in self._running:
            if future.done():
                future.result()
            else:
                waiting.append(future)
        self._running = waiting
