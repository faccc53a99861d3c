"""The model's own forward gives each site its inputs: the streams of states on their way through
the blocks.

The states between two stages are in memory where they fit, else in the run's work folder. There in
any case are the residuals before the block in hand: a run that was killed enters that block again.
Experts see other tokens in the model that is rounded than in the float one; for them no drift is
summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.from_tokens import TokenSource
from ptq_cli.calibration.source import Parts, Place, Source
from ptq_cli.calibration.stream import Decode, Held, Stream, last_residuals
from ptq_cli.core.statistics import Coupling, Drift, SiteStatistics
from ptq_cli.errors import InputError
from ptq_cli.models.forward.head_fisher import head_fisher
from ptq_cli.numerics.coupling import make_coupling
from ptq_cli.numerics.drift import DriftSum
from ptq_cli.numerics.statistics import NonFiniteInput, SiteAccumulator
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.scratch import Scratch


class Streams:
    """The model in one version, or in two side by side, at the same stage of the same block; at
    first, about to enter a block.

    work: a folder for scratch files that survives a kill
    workers, memory: batches side by side, and the bytes that the run may take
    checkpoint: of the model that is rounded, where it is not the float model's

    streams: the first one gives the sites their inputs; a second one is the float model, and what
        it sees beside the first is the drift
    embedded: what gives the tensors that are rounded in the first version before any site
    divisors: of sites whose inputs are smoothed in the first version, [in_features]: what the float
        model's inputs are divided by before they are compared
    """

    def __init__(
        self,
        source: TokenSource,
        work: Path,
        workers: int | None,
        memory: int | None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        reads = {"rounded": (checkpoint or source.checkpoint).read} if source.feedback else {}
        if source.drifts or not source.feedback:
            reads["float"] = source.checkpoint.read
        n_threads = source.n_threads(workers, memory)
        self.source = source
        in_memory = source.in_memory(memory)
        self.streams = [
            Stream(name, read, source, work, n_threads, in_memory=in_memory)
            for name, read in reads.items()
        ]
        self.main = self.streams[0]
        self.embedded: Mapping[str, Decode] = {}
        self.divisors: dict[str, NDArray[np.float32]] = {}
        self._shared: SiteStatistics | None = None  # of all experts at the stage in hand

    @property
    def order(self) -> tuple[int, int]:
        """The block and the stage in hand."""
        return self.main.block, self.main.stage

    def place(self, site: str) -> Place:
        return self.source.places[site]

    def orders(self, last: tuple[int, int]) -> list[tuple[int, int]]:
        """Blocks and stages from the one in hand to `last`."""
        found = {place.order for place in self.source.places.values()}
        return sorted(order for order in found if self.order <= order <= last)

    def enter(self, block: int) -> None:
        """Stand at the first stage of the last block, up to `block`, whose boundary every stream
        left; else of the first block."""
        for start in range(block, 0, -1):
            if all(stream.boundary(start).whole for stream in self.streams):
                break
        else:
            start = 0
            self.main.embed(self.embedded)
            for other in self.streams[1:]:
                other.embed()
        for stream in self.streams:
            stream.enter(start)

    @contextmanager
    def float_ahead(self) -> Iterator[None]:
        """Let the float model leave the stage in hand beside what is done inside the block, if
        there is a second thread; `advance` then moves the first stream alone."""
        with ExitStack() as running:
            for other in self.streams[1:]:
                if other.n_threads > 1:
                    running.enter_context(other.advancing())
            yield

    def advance(self, rounded: Mapping[str, Decode]) -> None:
        """Put every batch of every stream through the stage in hand; from a block's last stage on
        to the next block. rounded: what gives the tensors that are rounded in the first stream"""
        block, self._shared = self.main.block, None
        self.main.advance(rounded)
        for other in self.streams[1:]:
            if (other.block, other.stage) != self.order:
                other.advance({})
        if self.main.block != block:
            for stream in self.streams:
                stream.boundary(block).drop()

    def statistics(self, site: str) -> SiteStatistics | None:
        """Of a site of the stage in hand; None where no token reaches it, an expert that shares no
        other's.

        Raises:
            InputError: as `sums`.
        """
        place = self.source.places[site]
        if not self.known(site):
            return None
        if len(self.streams) < 2 or place.expert:
            return self.sums(site)
        with ThreadPoolExecutor(1) as pool:
            drift = pool.submit(copy_context().run, self._drift, site)  # its threads, too
            statistics = dataclasses.replace(self.sums(site), drift=drift.result())
        coupling = self.coupling if self.source.is_coupled(site) else None
        return dataclasses.replace(statistics, coupling=coupling)

    @cached_property
    def coupling(self) -> Coupling | None:
        """Of the rows of linears that add to the residual stream; None where there is none.

        From the float model's predictions on a few of the sequences that are calibrated on.
        """
        source = self.source
        hidden = last_residuals(source, self.main.n_threads)
        weights = Held(source.checkpoint.read, float32=False)
        return make_coupling(head_fisher(source.arch, weights, hidden))

    def known(self, site: str, ahead: Scratch | None = None) -> bool:
        """Whether a site has statistics. ahead: as of `sums`"""
        if not self.source.places[site].expert or self.source.own_tokens_needed(site):
            return True
        return self.main.count(site, ahead) > 0

    def sums(self, site: str, ahead: Scratch | None = None) -> SiteStatistics:
        """Of a site of the stage in hand, without the drift. ahead: of one that `look_ahead` saw.
        An expert that too few tokens reach shares those of all experts.

        Raises:
            InputError: the forward leaves the range of float32.
        """
        place, own = self.source.places[site], self.main.count(site, ahead)
        if own >= self.source.own_tokens_needed(site):
            return self._summed(site, [site], ahead)
        shared = self._shared if ahead is None else None
        if shared is None:
            places = self.source.places.items()
            beside = [x for x, own in places if own.order == place.order and own.expert]
            shared = self._summed(site, beside, ahead)
        if ahead is None:
            self._shared = shared
        return dataclasses.replace(shared, site=site, linears=place.linears, own_tokens=own)

    def _summed(self, site: str, sites: list[str], ahead: Scratch | None) -> SiteStatistics:
        """Of all inputs of some sites, as those of one."""
        source = self.source
        width = source.sites[site].in_features
        sums = SiteAccumulator(width, described=source.described, whole=source.hessians)
        inputs_of = (self.main.inputs(other, ahead) for other in sites)
        held_of = (self.main.held(other, ahead) for other in sites)
        both = zip(chain.from_iterable(inputs_of), chain.from_iterable(held_of), strict=True)
        for inputs, held in both:
            try:
                sums.update(inputs, held)
            except NonFiniteInput as error:
                raise InputError(
                    f"{site}: the model computes {error.value} on token {error.token} of"
                    f" {self.source.name}",
                    hint="is the checkpoint sound?",
                ) from None
        return sums.result(site, self.source.places[site].linears)

    def _drift(self, site: str) -> Drift:
        adds, whole = self.source.places[site].adds, self.source.sums_drift
        width = self.source.sites[site].in_features
        sums = DriftSum(width, self._weight(site) if adds and whole else None, whole=whole)
        ours, exact = (stream.inputs(site) for stream in self.streams)
        hidden, hidden_exact = (stream.hidden() for stream in self.streams)
        divisor = self.divisors.get(site)
        for inputs, wanted, held in zip(ours, exact, self.main.held(site), strict=True):
            stream = next(hidden_exact) - next(hidden) if adds else None
            sums.update(wanted if divisor is None else wanted / divisor, inputs, held, stream)
        return sums.result()

    def _weight(self, site: str) -> NDArray[np.float32]:
        """Of the one linear of a site that adds to the stream, before it is rounded, float32
        [out_features, in_features]."""
        (linear,) = self.source.places[site].linears
        weight = np.asarray(self.main.read(f"{linear}.weight"), np.float32)
        return weight.T if self.source.arch.transposed else weight

    def look_ahead(self, last: Place | None) -> Ahead:
        """The sites from the stage in hand to `last`, in the same block, before anything in between
        is changed; none where there is no `last`."""
        if last is None:
            return Ahead(self, None, name=self.source.name, sites={})
        inputs = self.main.look_ahead(last.stage)
        some = {
            site: self.source.sites[site]
            for site, place in self.source.places.items()
            if place.block == self.main.block and self.main.stage <= place.stage <= last.stage
            if self.known(site, inputs)
        }
        return Ahead(self, inputs, name=self.source.name, sites=some)


@dataclasses.dataclass(frozen=True)
class Ahead(Source):
    """Statistics of sites whose turn has not come: what they would see as things stand."""

    streams: Streams
    inputs: Scratch | None

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        return self.streams.sums(site, self.inputs)

    def drop(self) -> None:
        """They are no longer needed."""
        if self.inputs is not None:
            self.inputs.drop()


def through_sites(
    source: Source,
    work: Path,
    wanted: Container[str],
    workers: int | None = None,
    memory: int | None = None,
) -> Iterator[tuple[str, SiteStatistics | None]]:
    """for block: for stage: for site: statistics, as of `Streams.statistics`. The float model goes
    on when the next site is asked for, as far as the last one that is wanted.

    source: one in sequence, without feedback; work: a folder for scratch files
    workers, memory: as of `Streams`
    """
    assert isinstance(source, TokenSource)  # it is one in sequence
    streams = Streams(source, work, workers, memory)
    streams.enter(0)
    for site in filter(wanted.__contains__, source.sites):
        while streams.order < streams.place(site).order:
            streams.advance({})
        yield site, streams.statistics(site)
