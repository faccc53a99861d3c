"""The model's own forward gives each site its inputs: what is known before it runs (`Forward`), and
the streams of states on their way through the blocks (`Streams`).

The states between two stages lie in the run's work folder, and so do the residuals before the block
in hand: a run that was killed enters that block again. Experts see other tokens in the model that
is rounded than in the float one; for them no drift is summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.stream import Batch, Stream, batches, threads
from ptq_cli.core.statistics import SiteInfo, SiteStatistics
from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.layers import Tensor
from ptq_cli.models.forward.stages import stages
from ptq_cli.numerics.drift import DriftSum
from ptq_cli.numerics.statistics import NonFiniteInput, SiteAccumulator
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.scratch import Scratch
from ptq_cli.storage.tokens import Tokens


class NoTokens(InputError):
    """No token reaches a site (an expert that is never chosen)."""


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
    sites: Mapping[str, SiteInfo] = dataclasses.field(default_factory=dict)
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


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model and the tokens that it runs on. heldout: every how many tokens, how many at most"""

    checkpoint: Checkpoint
    tokens: Tokens
    heldout: tuple[int, int]

    @cached_property
    def arch(self) -> Architecture:
        return model_architecture(self.checkpoint)

    @cached_property
    def parts(self) -> tuple[Batch, ...]:
        return batches(self.tokens)

    @property
    def state_bytes(self) -> int:
        """Of a stream's states between two stages, at most."""
        return self.arch.state_memory(self.parts[-1].rows.stop)

    @property
    def residual_bytes(self) -> int:
        """Of a stream's residuals before and after a block."""
        return 2 * 4 * int(self.parts[-1].rows.stop) * self.arch.hidden_size

    def memory(self, workers: int | None, memory: int | None) -> int:
        """Bytes that running takes at most, on so many threads: what lies between the inputs and
        outputs of a block for each, and the weights of a stage, which all share."""
        n_threads = threads(self.arch, self.parts, workers, memory)
        most = max(batch.packing.n_tokens for batch in self.parts)
        weights = max(4 * self._size(place) for place in self.places.values())
        return n_threads * self.arch.block_memory(most) + weights

    def _size(self, place: Place) -> int:
        """Weights of a site's linears."""
        tensors = (self.checkpoint.tensors.get(f"{linear}.weight") for linear in place.linears)
        return sum(prod(tensor.spec.shape) for tensor in tensors if tensor is not None)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each site is, in the order of the forward."""
        packing = self.parts[0].packing
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
        seen = self.parts[-1].rows.stop
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


class Streams:
    """The model in one version, or in two side by side, at the same stage of the same block.

    streams: the first one gives the sites their inputs; a second one is the float model, and what
        it sees beside the first is the drift
    divisors: of sites whose inputs are smoothed in the first version, [in_features]: what the float
        model's inputs are divided by before they are compared
    """

    def __init__(self, forward: Forward, streams: list[Stream]) -> None:
        self.forward, self.streams = forward, streams
        self.main = streams[0]
        self.divisors: dict[str, NDArray[np.float32]] = {}

    @property
    def order(self) -> tuple[int, int]:
        """The block and the stage in hand."""
        return self.main.block, self.main.stage

    def place(self, site: str) -> Place:
        return self.forward.places[site]

    def orders(self, last: tuple[int, int]) -> list[tuple[int, int]]:
        """Blocks and stages from the one in hand to `last`."""
        found = {place.order for place in self.forward.places.values()}
        return sorted(order for order in found if self.order <= order <= last)

    def enter(self, block: int) -> None:
        """Stand at the first stage of the last block, up to `block`, whose boundary every stream
        left; else of the first block."""
        for start in range(block, 0, -1):
            if all(stream.boundary(start).whole for stream in self.streams):
                break
        else:
            start = 0
            for stream in self.streams:
                stream.embed()
        for stream in self.streams:
            stream.enter(start)

    def advance(self, rounded: Mapping[str, Tensor]) -> None:
        """Put every batch of every stream through the stage in hand; from a block's last stage on
        to the next block. rounded: tensors of the stage that are rounded in the first stream"""
        block = self.main.block
        self.main.advance(rounded)
        for other in self.streams[1:]:
            other.advance({})
        if self.main.block != block:
            for stream in self.streams:
                stream.boundary(block).drop()
                stream.enter(block + 1)

    def count(self, site: str) -> int:
        """How many tokens reach a site of the stage in hand."""
        return self.main.count(site)

    def statistics(self, site: str) -> SiteStatistics:
        """Of a site of the stage in hand.

        Raises:
            NoTokens: no token reaches this expert.
            InputError: the forward leaves the range of float32.
        """
        place = self.forward.places[site]
        if self.count(site) == 0:
            raise NoTokens(f"{site}: no token of {self.forward.tokens.name} is routed to it")
        if len(self.streams) < 2 or place.expert:
            return self._sums(site)
        with ThreadPoolExecutor(1) as pool:
            drift = pool.submit(self._drift, site)
            statistics = self._sums(site)
            matrix, exact = drift.result()
        return dataclasses.replace(statistics, drift=matrix, heldout_float=exact)

    def _sums(self, site: str, ahead: Scratch | None = None) -> SiteStatistics:
        sums = SiteAccumulator(self.forward.sites[site].in_features, *self.forward.heldout)
        for inputs in self.main.inputs(site, ahead):
            try:
                sums.update(inputs)
            except NonFiniteInput as error:
                raise InputError(
                    f"{site}: the model computes {error.value} on token {error.token} of"
                    f" {self.forward.tokens.name}",
                    hint="is the checkpoint sound?",
                ) from None
        return sums.result(site, self.forward.places[site].linears)

    def _drift(self, site: str) -> tuple[FloatArray, FloatArray]:
        sums = DriftSum(self.forward.sites[site].in_features, *self.forward.heldout)
        ours, exact = (stream.inputs(site) for stream in self.streams)
        divisor = self.divisors.get(site)
        for inputs, wanted in zip(ours, exact, strict=True):
            sums.update(wanted if divisor is None else wanted / divisor, inputs)
        return sums.result()

    def look_ahead(self, last: Place) -> Ahead:
        """The sites from the stage in hand to `last`, in the same block, before anything in between
        is changed."""
        inputs = self.main.look_ahead(last.stage)
        some = {
            site: self.forward.sites[site]
            for site, place in self.forward.places.items()
            if place.block == self.main.block and self.main.stage <= place.stage <= last.stage
            if self.main.count(site, inputs)
        }

        def load(site: str) -> SiteStatistics:
            return self._sums(site, inputs)

        return Ahead(self.forward.tokens.name, some, load, inputs.drop)

    def refresh(self) -> None:
        """Make the inputs of the stage in hand anew, behind a norm that has changed."""
        self.main.refresh()
