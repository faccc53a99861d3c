"""Where statistics come from: all that a source can be asked, whatever it reads.

Most sources make a site's statistics whenever they are asked, in any process, some of them in
parts. Statistics of a model that is rounded as it runs (`in_sequence`) are made on the way, in the
order of the forward: streams.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT, merge, smoothed
from ptq_cli.storage.digest import digest_words
from ptq_cli.storage.folded import Folds

HELDOUT = (HELDOUT_EVERY, HELDOUT_LIMIT)
Parts = tuple[int, int]  # a node of the tree of a site's parts: from the first to before the second
Ranges = Iterable[tuple[str, NDArray[np.float32]]]


def halves(parts: Parts) -> tuple[Parts, Parts]:
    """The two nodes below a node of more than one part: the left one holds a power of two."""
    first, stop = parts
    middle = first + (1 << (stop - first - 1).bit_length() - 1)
    return (first, middle), (middle, stop)


def only_entry(entries: Mapping[str, Any], site: str) -> dict[str, Any]:
    """The entry of one site, or none."""
    return {name: entry for name, entry in entries.items() if name == site}


@dataclass(frozen=True)
class FisherInfo:
    """A module's Fisher information before it is read. shape: of its tensor in the checkpoint"""

    module: str
    shape: tuple[int, ...]
    n_samples: int


@dataclass(frozen=True)
class Place:
    """Where a site is in the model: its block and stage, and whether it belongs to an expert.

    adds: whether the outputs of its linears are added to the residual stream as they are
    """

    block: int
    stage: int
    linears: tuple[str, ...]
    expert: bool
    adds: bool = False

    @property
    def order(self) -> tuple[int, int]:
        return self.block, self.stage


@dataclass(frozen=True, kw_only=True)
class Source:
    """Statistics by the site's name.

    name: what messages call it; sites: with the tokens that are not held out
    heldout: every how many tokens one is held out, how many at most
    files: what it reads; surplus: what of it fits no linear; warnings: what is odd about it
    weak: why errors measured on it say little (these stand among `warnings`, too)
    fisher: modules whose Fisher information it has
    diagonal: of the Hessian it knows the diagonal alone, and nothing else of the inputs
    described: how the values of the inputs are distributed is wanted too, for a statistics file
    hessians: whole Hessians are wanted; else their diagonals do, and what is summed here has zeros
        in place of the rest
    sums_drift: the drift is made up for, so its sums are wanted; else its held-out tokens do

    in_sequence: sites are made on the way, in their order; then
    feedback: rounded layers feed those after them
    drifts: its statistics have the drift of the inputs from the float model's
    places: where each site is in the model
    attentions, kv_heads: modules that cache keys and values, one a block, and their key heads
    """

    name: str
    sites: Mapping[str, SiteInfo]
    heldout: tuple[int, int] = HELDOUT
    files: Sequence[Path] = ()
    surplus: Sequence[str] = ()
    warnings: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()
    fisher: Mapping[str, FisherInfo] = field(default_factory=dict)
    diagonal: bool = False
    described: bool = False
    hessians: bool = True
    sums_drift: bool = True

    in_sequence: ClassVar[bool] = False
    feedback: bool = False
    drifts: bool = False
    places: Mapping[str, Place] = field(default_factory=dict)
    attentions: tuple[str, ...] = ()
    kv_heads: int = 0

    @cached_property
    def fingerprints(self) -> Sequence[str]:
        """What tells what it reads from anything else."""
        return ()

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        """The statistics of a site, or of some of its parts.

        Raises:
            InputError: what they are made from is damaged.
        """
        raise NotImplementedError(f"{self.name}: made on the way")

    def all_parts(self, site: str) -> Parts:
        """The root of the site's tree of parts."""
        return 0, 1

    def merged(self, left: SiteStatistics, right: SiteStatistics) -> SiteStatistics:
        """Statistics of two neighbouring parts as one."""
        return merge(left, right, self.heldout[1], self.hessians)

    def load_memory(self, site: str) -> int:
        """Bytes that `load` takes at most."""
        raise NotImplementedError

    def part_memory(self, site: str) -> int:
        """Bytes that one part takes at most."""
        return self.load_memory(site)

    def scratch(self, memory: int | None, *, ahead: bool = False) -> int:
        """Bytes of its own files in the work folder, at most.

        memory: bytes that the run may take; None: what there is
        ahead: it looks ahead (`Streams.look_ahead`)
        """
        return 0

    def bytes_read(self, site: str) -> int:
        """Bytes that are read for a site, about."""
        return 4 * self.sites[site].in_features ** 2

    def load_fisher(self, module: str) -> NDArray[np.float32]:
        """Fisher information, float32 in the shape of the weight. Raises InputError: none."""
        raise InputError(f"{self.name}: no gradients of {module}", hint="--calibration FILE")

    def only(self, site: str) -> Self:
        """The same for one site alone: all that a worker needs, and quickly sent."""
        own = self.sites[site].linears if site in self.sites else ()
        return replace(
            self,
            sites=only_entry(self.sites, site),
            files=(),
            surplus=(),
            fisher={module: info for module, info in self.fisher.items() if module in own},
            places=only_entry(self.places, site),
        )

    def digest(self, site: str, parts: Parts | None = None) -> str | None:
        """A digest of all that the statistics are made from; None where that is the run's own
        work."""
        return None

    def ranges(self, modules: Collection[str]) -> Ranges:
        """Sites with the largest absolute value of each channel, float32 [in_features]: of all,
        where these are known; where inputs must be read again, of the sites of `modules`."""
        return ()


@dataclass(frozen=True)
class SmoothedSource(Source):
    """Statistics of `base` behind its folds. (Fisher information was taken of other weights.)

    factors: what the inputs are divided by, [in_features], by the module of each linear
    """

    base: Source
    factors: Mapping[str, NDArray[np.float32]]

    def fold(self, statistics: SiteStatistics) -> SiteStatistics:
        """What `base` says of a site, behind its fold."""
        factors = self.factors.get(statistics.linears[0])
        return statistics if factors is None else smoothed(statistics, factors)

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        return self.fold(self.base.load(site, parts))

    def load_memory(self, site: str) -> int:
        """Another Hessian to fold."""
        return self.base.load_memory(site) + 4 * self.sites[site].in_features ** 2

    def only(self, site: str) -> SmoothedSource:
        linears = self.sites[site].linears if site in self.sites else ()
        own = {module: self.factors[module] for module in linears if module in self.factors}
        return replace(super().only(site), base=self.base.only(site), factors=own)

    def digest(self, site: str, parts: Parts | None = None) -> str:
        factors = (self.factors.get(module) for module in self.sites[site].linears)
        words = (values.tobytes().hex() for values in factors if values is not None)
        return digest_words(str(self.base.digest(site, parts)), *words)


def smoothed_source(base: Source, folds: Folds) -> SmoothedSource:
    """Statistics of `base` behind these folds."""
    factors = {linear.module: values for site, values in folds for linear in site.linears}
    return SmoothedSource(
        base, factors, name=base.name, sites=base.sites, heldout=base.heldout, files=base.files
    )
