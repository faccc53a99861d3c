"""Inputs that several linears may share: summed once while every call shows that they do."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.statistics import SiteStatistics
from ptq_cli.numerics.statistics import SiteAccumulator


@dataclass(frozen=True)
class _Seen:
    """An input. rows: [n, in_features]; held keeps its memory from being used again, so that
    `identity` stays true; None: nothing but its values tells it from another."""

    rows: NDArray[np.float32]
    identity: Hashable | None
    held: Any

    def equals(self, other: NDArray[np.float32]) -> bool:
        return self.rows.shape == other.shape and np.array_equal(self.rows, other)


@dataclass
class _Stream:
    """Linears that have seen the same so far, and the sums of it; None: nothing yet."""

    linears: list[str]
    sums: SiteAccumulator | None = None

    def update(self, rows: NDArray[np.float32], heldout: tuple[int, int]) -> None:
        if self.sums is None:
            self.sums = SiteAccumulator(rows.shape[1], *heldout, described=True)
        self.sums.update(rows)


class SharedInputs:
    """The inputs of linears that are likely to share them, such as q, k and v.

    A pass is a row of calls in which each is called at most once. After it, those whose inputs were
    different, or that were not called as others were, go apart for good, each with the sums of what
    it has seen: statistics are always those of a linear's own inputs.
    """

    def __init__(self, linears: tuple[str, ...], heldout: tuple[int, int]) -> None:
        self._heldout = heldout
        self._streams = [_Stream(list(linears))]
        self._pass: dict[str, _Seen] = {}
        self._count = len(linears)

    def take(
        self,
        linear: str,
        rows: Callable[[], NDArray[np.float32]],
        identity: Hashable | None = None,
        held: Any = None,
    ) -> None:
        """Take in the inputs of a call.

        rows: gives them, float32 [n, in_features], in memory that nobody writes to
        identity: inputs with the same are the same as long as `held` is alive
        """
        if linear in self._pass:
            self._end_pass()
        for seen in self._pass.values():
            if identity is not None and seen.identity == identity:
                self._pass[linear] = seen
                break
        else:
            values = rows()
            same = (seen for seen in self._pass.values() if seen.equals(values))
            self._pass[linear] = next(same, None) or _Seen(values, identity, held)
        if len(self._pass) == self._count:
            self._end_pass()

    def _end_pass(self) -> None:
        streams = []
        for stream in self._streams:
            apart: dict[int, list[str]] = {}
            for linear in stream.linears:
                apart.setdefault(id(self._pass.get(linear)), []).append(linear)
            parts = [
                _Stream(linears, deepcopy(stream.sums) if place else stream.sums)
                for place, linears in enumerate(apart.values())
            ]
            for part in parts:
                seen = self._pass.get(part.linears[0])
                if seen is not None:
                    part.update(seen.rows, self._heldout)
            streams += parts
        self._streams, self._pass = streams, {}

    def results(self) -> Iterator[SiteStatistics]:
        """The statistics of all that were called, one for those that share them; the sums are then
        used up."""
        self._end_pass()
        for stream in self._streams:
            if stream.sums is not None and stream.sums.n_tokens:
                yield stream.sums.result(stream.linears[0], tuple(stream.linears))
        self._streams = []
