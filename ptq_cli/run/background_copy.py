"""Finished tensors go to their places in the output while others are still being worked on.

One thread copies, so that the disk is busy from the beginning and nothing is left to write at the
end but headers. It holds no work that could be lost: units wait for nobody, and are copied again
where a run is interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from ptq_cli.storage.checkpoint import StoredTensor
from ptq_cli.storage.shards import Shards
from ptq_cli.storage.units import UnitStore


class BackgroundCopy:
    """Copies into `shards` in the background; without them it does nothing."""

    def __init__(self, shards: Shards | None) -> None:
        self._shards = shards
        self._thread = ThreadPoolExecutor(1)
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self.check()

    def put(self, tensors: Iterable[StoredTensor]) -> None:
        """Have tensors copied. Raises FileError of an earlier copy."""
        self._submit(lambda shards: shards.put(tensors))

    def put_unit(self, store: UnitStore, unit: str) -> None:
        """Have the tensors of a finished unit copied, where they are not in their places yet."""

        def copy(shards: Shards) -> None:
            tensors = store.tensors(unit)
            if store.entry(unit)["placed"]:
                shards.take(tensor.spec.name for tensor in tensors)
            else:
                shards.put(tensors)

        self._submit(copy)

    def _submit(self, copy: Callable[[Shards], None]) -> None:
        self.check()
        if self._shards is not None:
            self._running.append(self._thread.submit(copy, self._shards))

    def check(self) -> None:
        """Raises what a copy met."""
        while self._running and self._running[0].done():
            self._running.popleft().result()
