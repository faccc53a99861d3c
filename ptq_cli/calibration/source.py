"""Where statistics come from: all that a source can be asked, whatever it reads.

Most sources make a site's statistics whenever they are asked, in any process, some of them in
parts. Statistics of a model that is rounded as it runs (`in_sequence`) are made on the way, by
`streams`, in the order of the forward: run/in_sequence.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.streams import Place, Streams
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.storage.checkpoint import Checkpoint

Parts = tuple[int, int]  # a node of the tree of a site's parts: from the first to before the second
Ranges = Iterable[tuple[str, NDArray[np.float32]]]


def halves(parts: Parts) -> tuple[Parts, Parts]:
    """The two nodes below a node of more than one part: the left one holds a power of two."""
    first, stop = parts
    middle = first + (1 << (stop - first - 1).bit_length() - 1)
    return (first, middle), (middle, stop)


@dataclass(frozen=True)
class FisherInfo:
    """A module's Fisher information before it is read. shape: of its tensor in the checkpoint"""

    module: str
    shape: tuple[int, ...]
    n_samples: int


class Source:
    """Statistics by the site's name.

    in_sequence: sites are made on the way, in their order, by `streams`
    """

    in_sequence: ClassVar[bool] = False

    @property
    def feedback(self) -> bool:
        """Of a source `in_sequence`: whether rounded layers feed those after them."""
        return False

    @property
    def drifts(self) -> bool:
        """Whether its statistics have the drift of the inputs from the float model's."""
        return False

    @property
    def name(self) -> str:
        """What messages call it."""
        raise NotImplementedError

    @property
    def files(self) -> Sequence[Path]:
        """What it reads."""
        raise NotImplementedError

    @property
    def sites(self) -> Mapping[str, SiteInfo]:
        raise NotImplementedError

    @property
    def surplus(self) -> Sequence[str]:
        """What of it fits no linear."""
        return ()

    @property
    def fisher(self) -> Mapping[str, FisherInfo]:
        """Modules whose Fisher information it has."""
        return {}

    @property
    def places(self) -> Mapping[str, Place]:
        """Of a source `in_sequence`: where each site is in the model."""
        return {}

    @property
    def scratch(self) -> int:
        """Bytes of its own files in the work folder, at most."""
        return 0

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        """The statistics of a site, or of some of its parts.

        Raises:
            InputError: what they are made from is damaged.
        """
        raise NotImplementedError(f"{self.name}: made on the way, by `streams`")

    def streams(
        self,
        work: Path,
        workers: int | None,
        memory: int | None,
        checkpoint: Checkpoint | None = None,
    ) -> Streams:
        """Of a source `in_sequence`: what makes its statistics, block after block."""
        raise NotImplementedError(f"{self.name}: made whenever it is asked for, by `load`")

    def memory(self, workers: int | None, memory: int | None) -> int:
        """Bytes that the streams take at most, besides the statistics."""
        return 0

    def all_parts(self, site: str) -> Parts:
        """The root of the site's tree of parts."""
        return 0, 1

    def merged(self, left: SiteStatistics, right: SiteStatistics) -> SiteStatistics:
        """Statistics of two neighbouring parts as one."""
        raise NotImplementedError(f"{self.name}: has no parts")

    def n_tokens(self, site: str, parts: Parts) -> int:
        """Tokens of some of its parts."""
        return self.sites[site].n_tokens

    def load_memory(self, site: str) -> int:
        """Bytes that `load` takes at most."""
        raise NotImplementedError

    def part_memory(self, site: str) -> int:
        """Bytes that one part takes at most."""
        return self.load_memory(site)

    def bytes_read(self, site: str) -> int:
        """Bytes that are read for a site, about."""
        return 4 * self.sites[site].in_features ** 2

    def load_fisher(self, module: str) -> NDArray[np.float32]:
        """Fisher information, float32 in the shape of the weight. Raises InputError: none."""
        raise InputError(f"{self.name}: no gradients of {module}", hint="--calibration FILE")

    def only(self, site: str) -> Self:
        """The same for one site alone: all that a worker needs, and quickly sent."""
        return self

    def digest(self, site: str, parts: Parts | None = None) -> str | None:
        """A digest of all that the statistics are made from; None where that is the run's own
        work."""
        return None

    def ranges(self, modules: Collection[str]) -> Ranges:
        """Sites with the largest absolute value of each channel, float32 [in_features]: of all,
        where these are known; where inputs must be read again, of the sites of `modules`."""
        return ()
