"""Where statistics come from: what every source can be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.gradients import FisherInfo
from ptq_cli.core.plugins import Work
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.models.forward.layers import Tensor


class StatisticsSource(Protocol):
    """Statistics by the site's name.

    name: what messages call the source; files: what it reads; surplus: what of it fits no linear
    fisher: modules whose Fisher information it has; `load_fisher` gives it, float32 in the shape
        of the weight
    """

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def surplus(self) -> Sequence[str]: ...

    @property
    def sites(self) -> Mapping[str, SiteInfo]: ...

    @property
    def fisher(self) -> Mapping[str, FisherInfo]: ...

    def load(self, site: str) -> SiteStatistics: ...

    def load_memory(self, site: str) -> int:
        """Bytes that `load` takes at most."""
        ...

    def load_fisher(self, module: str) -> NDArray[np.float32]: ...


@runtime_checkable
class StreamingSource(StatisticsSource, Protocol):
    """Statistics that are made on the way, in one process: sites must be asked for in the order of
    `sites`, each after the layers before it were rounded.

    begin: called once before that, with a folder for scratch files that survives a kill, and with
        what a layer's tensor is once it is rounded (None before); workers, memory: the
        threads and bytes it may use
    scratch: bytes that those files take at most
    memory: bytes that the forward takes, with so many workers and that limit
    work: roughly what it computes to get a site's statistics
    """

    def memory(self, workers: int | None, memory: int | None) -> int: ...

    def work(self, site: str) -> Work: ...

    @property
    def scratch(self) -> int: ...

    def begin(
        self,
        work: Path,
        rounded: Callable[[str], Tensor | None],
        workers: int | None,
        memory: int | None,
    ) -> None: ...


def scratch_of(source: StatisticsSource | None) -> int:
    """Bytes of a source's own files in the work folder."""
    return source.scratch if isinstance(source, StreamingSource) else 0


class NoTokens(InputError):
    """No token reaches a site (an expert that is never chosen)."""


@runtime_checkable
class PortableSource(StatisticsSource, Protocol):
    """A source whose sites do not depend on one another: workers can make them, in any order."""

    def only(self, site: str | None) -> PortableSource:
        """The same for one site alone: all that a worker needs, and quickly sent."""
        ...

    def digest(self, site: str) -> str:
        """A digest of all that the site's statistics are made from."""
        ...
