"""Statistics from tokens: the model's own forward gives each site its inputs.

A `TokenSource` runs one or two streams through the model, and is asked for sites in their order:

- for `ptq calibrate` and `--parallel-layers`: the float model's stream alone;
- else the stream of the model as it is rounded: by the time a site is asked for, every layer before
  it is, and its inputs are what they will be. Beside it, where the drift is to be corrected, the
  float model's stream; the two give `SiteStatistics.drift` and `heldout_float`.

The states between two stages lie in the run's work folder, and so do the residuals before the block
in hand: a run that was killed enters that block again, with the layers rounded so far taken from
the finished units. Experts see other tokens in either stream; for them nothing is corrected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.gradients import FisherInfo
from ptq_cli.calibration.source import NoTokens
from ptq_cli.calibration.stream import Read, Stream, batches, threads
from ptq_cli.core.plugins import Work
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.layers import Tensor
from ptq_cli.models.forward.memory import block_memory, state_memory
from ptq_cli.models.forward.stages import stages
from ptq_cli.numerics.drift import DriftSum
from ptq_cli.numerics.statistics import (
    NonFiniteInput,
    SiteAccumulator,
    statistics_memory,
    statistics_work,
)
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.scratch import Scratch
from ptq_cli.storage.tokens import Tokens

Rounded = Callable[[str], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a site is: its block and stage, and whether it belongs to an expert."""

    block: int
    stage: int
    linears: tuple[str, ...]
    expert: bool

    @property
    def order(self) -> tuple[int, int]:
        return self.block, self.stage


def _nowhere(site: str) -> SiteStatistics:
    raise KeyError(site)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Statistics of sites whose turn has not come: what they would see as things stand.

    drop: called once they are no longer needed
    """

    name: str
    sites: Mapping[str, SiteInfo]
    load: Callable[[str], SiteStatistics] = _nowhere
    drop: Callable[[], None] = lambda: None


def model_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture that the config.json beside the weights describes.

    Raises:
        InputError: no config.json, or an architecture without a forward.
    """
    if not checkpoint.config:
        raise InputError(
            f"{checkpoint.folder}: no config.json, which the forward needs",
            hint="name the model folder, or bring activations with --activations",
        )
    return read_architecture(checkpoint.config, checkpoint.tensors)


class TokenSource:
    """A `StreamingSource` (storage/calibration.py) of what the model sees on `tokens`.

    feedback: layers that are rounded already feed the layers after them
    correct: sum up the drift from the float model, too
    divisors: of sites whose inputs are smoothed in the model that is rounded, [in_features]: what
        the float model's inputs are divided by before they are compared
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Tokens,
        heldout: tuple[int, int],
        *,
        feedback: bool = False,
        correct: bool = False,
    ) -> None:
        self.checkpoint, self.tokens, self.heldout = checkpoint, tokens, heldout
        self.feedback, self.correct = feedback, feedback and correct
        self.arch = model_architecture(checkpoint)
        self.name, self.files = tokens.name, tokens.files
        self.surplus: tuple[str, ...] = ()
        self.fisher: Mapping[str, FisherInfo] = {}
        self.divisors: dict[str, NDArray[np.float32]] = {}
        self._parts = batches(tokens)
        self._streams: list[Stream] = []

    @property
    def fingerprint(self) -> str:
        mode = "float" if not self.feedback else "drift" if self.correct else "sequential"
        return f"{self.tokens.fingerprint} {mode}"

    @property
    def scratch(self) -> int:
        """Bytes of the streams' files at most: each has the states between two stages, the residual
        before the block in hand, and the one after it."""
        state = state_memory(self.arch, self._parts[-1].rows.stop)
        return (1 + self.correct) * (state + self.residuals)

    @property
    def residuals(self) -> int:
        """Bytes of the residuals before and after a block."""
        return 2 * 4 * int(self._parts[-1].rows.stop) * self.arch.hidden_size

    def memory(self, workers: int | None, memory: int | None) -> int:
        """Bytes that the forward takes at most, on so many threads: what lies between the inputs
        and outputs of a block for each, and the weights of a stage, which all share."""
        n_threads = threads(self.arch, self._parts, workers, memory)
        most = max(batch.packing.n_tokens for batch in self._parts)
        weights = max(4 * self._size(place) for place in self.places.values())
        return n_threads * block_memory(self.arch, most) + weights

    def work(self, site: str) -> Work:
        """Roughly what it takes to get a site's statistics: the forward through its linears in
        every stream, a share of what lies between them, the sums, those of the drift too."""
        info, length = self.sites[site], self.tokens.ids.shape[1]
        hidden, heads = self.arch.hidden_size, self.arch.n_heads * self.arch.head_dim
        between = Work(length * heads / 4, 10 * hidden + 6 * self.arch.intermediate_size)
        forward = Work(self._size(self.places[site])) + between
        streams = forward * ((1 + self.correct) * info.n_tokens)
        sums = statistics_work(info.n_tokens, info.in_features)
        if self.correct:
            sums += Work(info.in_features**2, 10 * info.in_features) * info.n_tokens
        return streams + sums + Work(calls=4000 * len(self._parts))

    def _size(self, place: Place) -> int:
        """Weights of a site's linears."""
        tensors = (self.checkpoint.tensors.get(f"{linear}.weight") for linear in place.linears)
        return sum(prod(tensor.spec.shape) for tensor in tensors if tensor is not None)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each site is, in the order of the forward."""
        packing = self._parts[0].packing
        return {
            site: Place(block, number, linears, len(stage.sites) > 1)
            for block in range(len(self.arch.blocks))
            for number, stage in enumerate(stages(self.arch, block, packing))
            for site, linears in stage.sites.items()
        }

    @cached_property
    def sites(self) -> Mapping[str, SiteInfo]:
        """The sites in the order of the forward. Of experts, the tokens are what each would get."""
        every, limit = self.heldout
        seen = self._parts[-1].rows.stop
        n_tokens = seen - min(limit, seen // every if every else 0)
        return {
            site: SiteInfo(site, place.linears, self._width(place), self._share(place, n_tokens))
            for site, place in self.places.items()
        }

    def _width(self, place: Place) -> int:
        name = f"{place.linears[0]}.weight"
        stored = self.checkpoint.tensors.get(name)
        if stored is None or len(stored.spec.shape) != 2:
            raise InputError(
                f"{self.checkpoint.path}: no tensor {name!r}, which config.json's model_type"
                f" {self.arch.family!r} has",
                hint="bring activations with --activations, which works for any model",
            )
        transposed = any(linear.transposed for linear in self.arch.blocks[place.block].qkv)
        return stored.spec.shape[0 if transposed else 1]

    def _share(self, place: Place, n_tokens: int) -> int:
        experts = self.arch.blocks[place.block].experts
        if experts is None or not place.expert:
            return n_tokens
        return n_tokens * experts.top_k // len(experts.outputs)

    def begin(
        self, work: Path, rounded: Rounded, workers: int | None = None, memory: int | None = None
    ) -> None:
        """Begin, or go on.

        work: a folder of the run's; rounded: what a rounded layer's tensor is, or None where it is
        not rounded (yet); workers, memory: batches side by side, and the bytes they may take
        """

        def current(name: str) -> Tensor:
            values = rounded(name)
            return self.checkpoint.read(name) if values is None else values

        reads: dict[str, Read] = {"rounded": current} if self.feedback else {}
        if self.correct or not self.feedback:
            reads["float"] = self.checkpoint.read
        n_threads = threads(self.arch, self._parts, workers, memory)
        self._streams = [
            Stream(name, self.arch, read, self._parts, work, n_threads)
            for name, read in reads.items()
        ]

    def load(self, site: str) -> SiteStatistics:
        """The statistics of a site, whose place is not before the last one's.

        Raises:
            NoTokens: no token reaches this expert.
            InputError: the forward leaves the range of float32.
        """
        place = self.places[site]
        self.go_to(place)
        main = self._streams[0]
        if main.count(site) == 0:
            raise NoTokens(f"{site}: no token of {self.name} is routed to it")
        if len(self._streams) < 2 or place.expert:
            return self._statistics(site)
        with ThreadPoolExecutor(1) as pool:
            drift = pool.submit(self._drift, site)
            statistics = self._statistics(site)
            matrix, exact = drift.result()
        return dataclasses.replace(statistics, drift=matrix, heldout_float=exact)

    def load_memory(self, site: str) -> int:
        """Sums of the inputs, and of the drift; the forward has a budget of its own."""
        info = self.sites[site]
        return statistics_memory(info.in_features, info.n_tokens) * (2 if self.correct else 1)

    def load_fisher(self, module: str) -> NDArray[np.float32]:
        """Raises InputError: tokens have no gradients."""
        raise InputError(f"{self.name}: no gradients of {module}", hint="--calibration FILE")

    def _statistics(self, site: str, ahead: Scratch | None = None) -> SiteStatistics:
        sums = SiteAccumulator(self.sites[site].in_features, *self.heldout)
        for inputs in self._streams[0].inputs(site, ahead):
            try:
                sums.update(inputs)
            except NonFiniteInput as error:
                raise InputError(
                    f"{site}: the model computes {error.value} on token {error.token} of"
                    f" {self.name}",
                    hint="is the checkpoint sound?",
                ) from None
        return sums.result(site, self.places[site].linears)

    def _drift(self, site: str) -> tuple[FloatArray, FloatArray]:
        sums = DriftSum(self.sites[site].in_features, *self.heldout)
        ours, exact = (stream.inputs(site) for stream in self._streams)
        divisor = self.divisors.get(site)
        for inputs, wanted in zip(ours, exact, strict=True):
            sums.update(wanted if divisor is None else wanted / divisor, inputs)
        return sums.result()

    def look_ahead(self, last: Place) -> Ahead:
        """The sites from the stage in hand to `last`, in the same block, before anything in between
        is changed."""
        stream = self._streams[0]
        inputs = stream.look_ahead(last.stage)
        here = (p for p in self.places.items() if p[1].block == stream.block)
        sites = [site for site, p in here if stream.stage <= p.stage <= last.stage]
        some = {site: self.sites[site] for site in sites if stream.count(site, inputs)}

        def load(site: str) -> SiteStatistics:
            return self._statistics(site, inputs)

        return Ahead(self.name, some, load, inputs.drop)

    def refresh(self) -> None:
        """Make the inputs of the stage in hand anew, behind a norm that has changed."""
        self._streams[0].refresh()

    def go_to(self, place: Place) -> None:
        """Bring every stream to a site's stage, which must not lie behind them."""
        if self._streams[0].block < 0:
            self._enter_last(place.block)
        while (here := self._streams[0]).block < place.block:
            block = here.block
            for stream in self._streams:
                self._finish_block(stream)
            for stream in self._streams:
                stream.boundary(block).drop()
                stream.enter(block + 1)
        for stream in self._streams:
            while stream.stage < place.stage:
                stream.advance()

    @staticmethod
    def _finish_block(stream: Stream) -> None:
        block = stream.block
        while stream.block == block:
            stream.advance()

    def _enter_last(self, block: int) -> None:
        """Enter the last block, up to `block`, whose boundary every stream left."""
        for start in range(block, 0, -1):
            if all(stream.boundary(start).whole for stream in self._streams):
                break
        else:
            start = 0
            for stream in self._streams:
                stream.embed()
        for stream in self._streams:
            stream.enter(start)
