"""A model run over many sequences, block by block and stage by stage, its states in memory or on
the disk.

Threads work on batches side by side, BLAS has one thread (the caller's business). A `Stream` is one
version of the model, given by its weights: the float one, or one whose layers are rounded as the
run goes on. Weights are read for a stage, shared by its batches, and dropped; those of experts, of
which there may be hundreds, are read when a batch needs them, one linear at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.from_tokens import FEW_TOKENS, Batch, TokenSource
from ptq_cli.core.tensors import Array
from ptq_cli.models.experts import is_expert
from ptq_cli.models.forward.attention import Cache, Packing, pack
from ptq_cli.models.forward.branch import Flow, Routing
from ptq_cli.models.forward.layers import LinearTensor, Tensor
from ptq_cli.models.forward.stages import Stage, State, begin, embed, forward_block, stages
from ptq_cli.numerics.kv_cache import head_absmax
from ptq_cli.storage.scratch import FileScratch, MemoryScratch, Rows, Scratch

Read = Callable[[str], Tensor]
Decode = Callable[[], Tensor]  # gives a tensor that is rounded


class Held:
    """Tensors, as float32 where asked for; threads may share it. They are read once and kept; those
    of experts are read anew each time. instead: what gives those that are not to be read"""

    def __init__(
        self, read: Read, *, float32: bool = True, instead: Mapping[str, Decode] = {}
    ) -> None:
        self._read, self._float32, self._instead = read, float32, instead
        self._kept: dict[str, Tensor] = {}
        self._lock = Lock()

    def __call__(self, name: str) -> Tensor:
        if is_expert(name):
            return self._get(name)
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self._get(name)
            return self._kept[name]

    def _get(self, name: str) -> Tensor:
        tensor = self._instead[name]() if name in self._instead else self._read(name)
        if not self._float32:
            return tensor
        if isinstance(tensor, LinearTensor):
            return replace(tensor, values=_float32(tensor.values))
        return _float32(tensor)


def _float32(values: Array) -> NDArray[np.float32]:
    """Of experts whose rows take turns in one tensor, a copy: matrix products are slow on every
    other row."""
    whole = values.flags.c_contiguous or values.flags.f_contiguous
    return values.astype(np.float32, order="K" if whole else "C", copy=False)


class Stream:
    """One version of the model on its way through the blocks.

    read: its tensors by name, before they are rounded
    in_memory: where the states between two stages are, not in files
    block, stage: where the states stand; stage k means that the inputs of stage k are there
    caches: by block, what becomes of the keys and values that attention caches
    """

    def __init__(
        self,
        name: str,
        read: Read,
        source: TokenSource,
        work: Path,
        n_threads: int,
        *,
        in_memory: bool = True,
    ) -> None:
        self.name, self.read, self.work, self.n_threads = name, read, work, n_threads
        self.arch, self.batches, self.in_memory = source.arch, source.batches, in_memory
        self.scratch = self._new_scratch("now")
        self.block = self.stage = -1
        self.caches: dict[int, Cache] = {}

    def boundary(self, block: int) -> Rows:
        """The residual before `block`: what survives a kill."""
        parts = [batch.rows for batch in self.batches]
        return Rows(self.work / f"{self.name}.{block}", parts, self.arch.hidden_size)

    def embed(self, rounded: Mapping[str, Decode] = {}) -> None:
        """Make the residual before the first block. rounded: as of `advance`"""
        rows = self.boundary(0)

        def work(weights: Held, batch: Batch) -> None:
            rows.write(batch.rows, embed(self.arch, weights, batch.tokens, batch.packing))

        rows.begin()
        self._in_threads(work, rounded, float32=False)
        rows.finish()

    def enter(self, block: int) -> None:
        """Stand at the first stage of `block`, from the residual before it."""
        rows = self.boundary(block)

        def work(weights: Held, batch: Batch) -> None:
            self._keep(batch, begin(self.arch, block, weights, rows.read(batch.rows)))

        self._in_threads(work)
        self.block, self.stage = block, 0

    def advance(self, rounded: Mapping[str, Decode]) -> None:
        """Apply the stage in hand to every batch; behind the last one the boundary is written, and
        the next block entered (who drops the boundary before it knows whether another stream still
        needs it). rounded: what gives the tensors that are used in place of those that are read"""
        with self.advancing(rounded):
            pass

    @contextmanager
    def advancing(self, rounded: Mapping[str, Decode] = {}) -> Iterator[None]:
        """`advance`, beside what is done inside the block."""
        last = self.stage + 1 == len(self._stages(self.batches[0]))
        rows = self.boundary(self.block + 1)
        if last:
            rows.begin()

        def work(weights: Held, batch: Batch) -> None:
            state = self._stages(batch)[self.stage].apply(weights, self._state(batch))
            if last:
                hidden = np.ascontiguousarray(state.hidden, np.float32)
                rows.write(batch.rows, hidden)
                state = begin(self.arch, self.block + 1, weights, hidden)
            self._keep(batch, state)

        with self._beside(work, rounded):
            yield
        self.stage += 1
        if last:
            rows.finish()
            self.block, self.stage = self.block + 1, 0

    def refresh(self) -> None:
        """Make the inputs of the stage in hand anew, where a norm gives them that has changed."""

        def work(weights: Held, batch: Batch) -> None:
            enter = self._stages(batch)[self.stage].enter
            if enter is not None:
                self._keep(batch, enter(weights, self._state(batch)))

        self._in_threads(work)

    def look_ahead(self, last: int) -> Scratch:
        """The inputs of the sites of the stage in hand and those after it, up to stage `last`, with
        the weights as they are now; batch by batch, `inputs/<site>`. The stream stays where it is.
        """
        ahead = self._new_scratch("ahead")

        def work(weights: Held, batch: Batch) -> None:
            state = self._state(batch)
            arrays = _inputs(state)
            for stage in self._stages(batch)[self.stage : last]:
                state = stage.apply(weights, state)
                arrays |= _inputs(state)
            ahead.put(batch.key, arrays)

        self._in_threads(work)
        return ahead

    def cache_reach(self, rounded: Mapping[str, Decode]) -> NDArray[np.float32]:
        """The largest absolute values that the attention of the block in hand caches in each head,
        its first stage in hand: [keys and values, calibration and held-out tokens, n_kv_heads].
        rounded: as of `advance`"""
        attention, found = self.arch.attentions[self.block], []
        site = f"inputs/{attention.first_sites[0]}"

        def work(weights: Held, batch: Batch) -> None:
            inputs = self.scratch.get(batch.key, site)
            cached = attention.heads(weights, inputs, batch.packing, roles="kv")
            rows = ~batch.held, batch.held
            found.append([[head_absmax(heads[own]) for own in rows] for heads in cached])

        self._in_threads(work, rounded)
        reach: NDArray[np.float32] = np.max(found, axis=0)
        return reach

    def cross(self, block: int, source: Rows) -> Rows:
        """The residual after `block`, from that before it, without a stop at its stages."""
        rows = self.boundary(block + 1)
        rows.begin()

        def work(weights: Held, batch: Batch) -> None:
            hidden = source.read(batch.rows)
            cache = self.caches.get(block)
            hidden = forward_block(self.arch, block, weights, hidden, batch.packing, cache=cache)
            rows.write(batch.rows, hidden)

        self._in_threads(work)
        rows.finish()
        return rows

    def inputs(self, site: str, where: Scratch | None = None) -> Iterator[NDArray[np.float32]]:
        """The inputs of a site of the stage in hand, batch by batch. where: of `look_ahead`"""
        scratch = self.scratch if where is None else where
        return (scratch.get(batch.key, f"inputs/{site}") for batch in self.batches)

    def held(self, site: str, where: Scratch | None = None) -> Iterator[NDArray[np.bool_]]:
        """Which of these inputs are held out."""
        scratch = self.scratch if where is None else where
        for batch in self.batches:
            rows = f"rows/{site}"
            routed = rows in scratch.names(batch.key)
            yield batch.held[scratch.get(batch.key, rows)] if routed else batch.held

    def hidden(self) -> Iterator[NDArray[np.float32]]:
        """The residual at the stage in hand, batch by batch."""
        return (self.scratch.get(batch.key, "hidden") for batch in self.batches)

    def count(self, site: str, where: Scratch | None = None) -> int:
        """How many tokens reach the site, those held out aside."""
        return sum(int((~held).sum()) for held in self.held(site, where))

    def _stages(self, batch: Batch) -> tuple[Stage, ...]:
        return stages(self.arch, self.block, batch.packing, self.caches.get(self.block))

    def _in_threads(
        self,
        work: Callable[[Held, Batch], None],
        rounded: Mapping[str, Decode] = {},
        *,
        float32: bool = True,
    ) -> None:
        """`work` with the weights on every batch, `n_threads` at a time."""
        with self._beside(work, rounded, float32):
            pass

    @contextmanager
    def _beside(
        self,
        work: Callable[[Held, Batch], None],
        rounded: Mapping[str, Decode],
        float32: bool = True,
    ) -> Iterator[None]:
        """The same, beside what is done inside the block; where that fails, no more is begun."""
        weights = Held(self.read, float32=float32, instead=rounded)
        with ThreadPoolExecutor(self.n_threads) as pool:
            done = pool.map(partial(work, weights), self.batches)
            try:
                yield
                for _ in done:
                    pass  # an error of a thread is raised here
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _new_scratch(self, name: str) -> Scratch:
        return MemoryScratch() if self.in_memory else FileScratch(self.work / f"{self.name}.{name}")

    def _keep(self, batch: Batch, state: State) -> None:
        """Put a state aside, as named arrays."""
        arrays = {"hidden": state.hidden, **_inputs(state)}
        arrays |= {f"beside/{name}": array for name, array in state.flow.beside.items()}
        if (routing := state.flow.routing) is not None:
            shares = zip(routing.sites, routing.share, strict=True)
            arrays |= {f"share/{site}": share for site, share in shares}
        self.scratch.put(batch.key, arrays)

    def _state(self, batch: Batch) -> State:
        """The state that was kept."""
        arrays: dict[str, dict[str, Array]] = {}
        for name in self.scratch.names(batch.key):
            kind, _, rest = name.partition("/")
            arrays.setdefault(kind, {})[rest] = self.scratch.get(batch.key, name)
        routing, inputs = None, arrays.get("inputs", {})
        if rows := arrays.get("rows"):
            shares = tuple(arrays["share"][site] for site in rows)
            routing = Routing(tuple(rows), tuple(rows.values()), shares)
        flow = Flow(inputs, arrays.get("beside", {}), routing)
        return State(arrays["hidden"][""], flow)


def last_residuals(source: TokenSource, n_threads: int) -> NDArray[np.float32]:
    """What the float model has behind its last block on a few sequences, float32
    [n_tokens, hidden_size]: evenly spaced ones of those that are calibrated on, together
    FEW_TOKENS at most, or the first of them. There must be one."""
    sequences = [part for batch in source.batches for part in _sequences(batch)]
    length = max(packing.n_tokens for _, packing in sequences)
    step = ceil(len(sequences) * length / FEW_TOKENS)
    some = sequences[::step]
    arch, weights = source.arch, Held(source.checkpoint.read, float32=False)
    states = [embed(arch, weights, tokens, packing) for tokens, packing in some]
    with ThreadPoolExecutor(n_threads) as pool:
        for block in range(len(arch.blocks)):
            own = Held(source.checkpoint.read)
            through = partial(forward_block, arch, block, own)
            states = list(pool.map(through, states, (packing for _, packing in some)))
    return np.concatenate(states)


def _sequences(batch: Batch) -> Iterator[tuple[Array, Packing]]:
    """The sequences of a batch, each alone, up to their first token that is held out."""
    for number, (start, stop) in enumerate(pairwise(batch.packing.starts)):
        held = np.flatnonzero(batch.held[start:stop])
        count = int(held[0]) if len(held) else stop - start
        if count:
            own = slice(number, number + 1)
            mask = batch.packing.mask[own].copy()
            mask[0, np.flatnonzero(mask[0])[count:]] = False
            yield batch.tokens[own], pack(mask.shape, mask)


def _inputs(state: State) -> dict[str, Array]:
    """What the sites of a stage see, and which tokens that are where they are routed, by name."""
    arrays: dict[str, Array] = {f"inputs/{site}": x for site, x in state.inputs.items()}
    if (routing := state.flow.routing) is not None:
        routed = zip(routing.sites, routing.rows, strict=True)
        arrays |= {f"rows/{site}": rows for site, rows in routed}
    return arrays
