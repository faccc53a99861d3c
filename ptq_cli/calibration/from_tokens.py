"""Statistics of what a model sees on tokens, by its own forward: what is known before it runs.

For `ptq calibrate` and `--parallel-layers` they are those of the float model; else those of the
model as it is rounded (`feedback`): by the turn of a site every layer before it is, and its inputs
are what they will be. With `drifts` the float model runs beside it, and the two give
`SiteStatistics.drift` and `heldout_float`. What runs is in streams.py.

The sequences go in batches of a fixed composition, so that no byte depends on the number of threads
or on the memory there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Place, Source
from ptq_cli.core.statistics import SiteInfo
from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError, stated_in
from ptq_cli.models.forward.architecture import Architecture, read_architecture
from ptq_cli.models.forward.attention import Packing, pack
from ptq_cli.models.forward.head_fisher import has_head_fisher, head_fisher_memory
from ptq_cli.models.forward.sizes import check_sizes
from ptq_cli.models.forward.stages import stages
from ptq_cli.numerics.drift import PACKED, UNPROVEN_STRENGTH, drift_memory
from ptq_cli.numerics.statistics import (
    HELDOUT_LIMIT,
    SAMPLE_LIMIT,
    heldout_tokens,
    statistics_memory,
)
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.machine import cores, memory_to_use
from ptq_cli.storage.tokens import Tokens

# Of larger batches the arrays come from the system anew each time, and page by page; experts are
# decoded anew for each batch.
BATCH_TOKENS = 1024
EXPERTS_TOKENS = 4096
# Rows are coupled in the last blocks alone: what the predictions make of the stream is known behind
# the last one, and holds the less the more blocks follow (docs/measurements.md).
COUPLED_BLOCKS = 6
FEW_TOKENS = 1024  # that say what the predictions make of the residual stream
KEPT_PART = 4  # of the memory that a run may take: one in so many parts is for states
READING = 12  # bytes a weight takes at most while it is read, or decoded, and made float32


@dataclass(frozen=True)
class Batch:
    """Sequences that go together.

    rows: their place among all packed tokens; held: [n_tokens], those that are held out
    """

    key: str
    tokens: Array
    packing: Packing
    rows: slice
    held: NDArray[np.bool_]


def batches(arch: Architecture, tokens: Tokens, heldout: tuple[int, int]) -> tuple[Batch, ...]:
    """Rows in their order, so many together that their columns are about BATCH_TOKENS, or
    EXPERTS_TOKENS; each sequence that is packed into one of them goes on its own."""
    has_experts = any(block.experts is not None for block in arch.blocks)
    step = max(1, (EXPERTS_TOKENS if has_experts else BATCH_TOKENS) // tokens.ids.shape[1])
    held = heldout_tokens(tokens.mask.sum(axis=1).tolist(), heldout)
    result, start = [], 0
    for first in range(0, len(tokens.ids), step):
        ids, mask = tokens.sequences(slice(first, first + step))
        packing = pack(ids.shape, mask)
        rows = slice(start, start + packing.n_tokens)
        if packing.n_tokens:
            result.append(Batch(f"{first:08d}", ids, packing, rows, held[rows]))
        start = rows.stop
    return tuple(result)


@dataclass(frozen=True)
class TokenSource(Source):
    """A model and the tokens that it runs on, in batches.

    state_bytes: of a stream's states between two stages
    residual_bytes: of a stream's residuals before and after a block, in files
    min_expert_tokens: with fewer an expert shares the statistics of all beside it; None: an eighth
        of its columns
    couples: its statistics have the coupling of rows, where the linears add to the stream
    """

    in_sequence: ClassVar[bool] = True
    checkpoint: Checkpoint
    tokens: Tokens
    arch: Architecture
    batches: tuple[Batch, ...]
    state_bytes: int
    residual_bytes: int
    min_expert_tokens: int | None = None
    couples: bool = False

    @cached_property
    def fingerprints(self) -> Sequence[str]:
        mode = "drift" if self.drifts else "sequential" if self.feedback else "float"
        coupled = " coupled" if self.couples else ""
        least = self.min_expert_tokens
        experts = "" if least is None else f" experts {least}"
        return [f"{self.tokens.fingerprint} {mode}{coupled}{experts}"]

    def own_tokens_needed(self, site: str) -> int:
        """Tokens, those held out aside, with which a site has statistics of its own: of an expert
        that fewer reach, they are those of all experts beside it."""
        if not self.places[site].expert:
            return 0
        return _own_tokens_needed(self.sites[site].in_features, self.min_expert_tokens)

    @property
    def _largest_batch(self) -> int:
        return max(batch.packing.n_tokens for batch in self.batches)

    def n_threads(self, workers: int | None = None, memory: int | None = None) -> int:
        """How many batches run side by side: one a core, fewer where `memory` is short."""
        count = cores() if workers is None else workers
        if memory is not None:
            room = memory - (self._kept(ahead=False) if self.in_memory(memory) else 0)
            count = min(count, max(1, room // self._batch_memory))
        return max(1, min(count, len(self.batches)))

    @property
    def _n_streams(self) -> int:
        return 1 + self.drifts

    def in_memory(self, memory: int | None) -> bool:
        """Whether the states between two stages are kept in memory, all of them, by a run that may
        take `memory` (None: what there is): where they fit a quarter of it."""
        room = memory_to_use() if memory is None else memory
        return self._n_streams * self.state_bytes <= room // KEPT_PART

    def scratch(self, memory: int | None, *, ahead: bool = False) -> int:
        boundaries = self._n_streams * self.residual_bytes
        return boundaries + (0 if self.in_memory(memory) else self._kept(ahead=ahead))

    def _kept(self, *, ahead: bool) -> int:
        """Bytes of the states of all streams; as much again, residuals too, for looking ahead."""
        more = self.state_bytes + self.residual_bytes if ahead else 0
        return self._n_streams * (self.state_bytes + more)

    def memory(self, workers: int | None, memory: int | None, *, ahead: bool = False) -> int:
        """Bytes that it takes at most besides the statistics, on so many threads: what is kept, and
        what runs. ahead: as of `scratch`"""
        kept = self._kept(ahead=ahead) if self.in_memory(memory) else self._read_memory
        return kept + self.running_memory(workers, memory)

    @property
    def _read_memory(self) -> int:
        """Bytes that are read of states in files at a time: a site's inputs for its sums, and for
        its drift both models' inputs and residuals."""
        width = max(info.in_features for info in self.sites.values())
        drift = 2 * (width + self.arch.hidden_size) if self.drifts else 0
        return 4 * self._largest_batch * (width + drift)

    def running_memory(self, workers: int | None, memory: int | None) -> int:
        """Bytes that running takes at most: a batch and an expert for each thread, and the weights
        of a stage, experts aside, which all share."""
        coupling = 4 * self.arch.hidden_size**2 if self.couples else 0
        batches = self.n_threads(workers, memory) * self._batch_memory
        return coupling + batches + self._stage_memory

    @cached_property
    def _batch_memory(self) -> int:
        """Bytes of what lies between the inputs and outputs of a block for a batch, and of the one
        linear of an expert that it goes through: as it is read or decoded, and in float32."""
        experts = (x for place in self.places.values() if place.expert for x in place.linears)
        weight = max(map(self._size, experts), default=0)
        return self.arch.block_memory(self._largest_batch) + READING * weight

    @property
    def _stage_memory(self) -> int:
        """Bytes of the weights of a stage, experts aside, in float32."""
        sizes: Counter[tuple[int, int]] = Counter()
        for place in self.places.values():  # behind the blocks is the head: nothing goes through it
            if place.block < len(self.arch.blocks) and not place.expert:
                sizes[place.order] += 4 * sum(map(self._size, place.linears))
        return max(sizes.values(), default=0)

    def _size(self, linear: str) -> int:
        """Weights of a linear."""
        tensor = self.checkpoint.tensors.get(f"{linear}.weight")
        return 0 if tensor is None else prod(tensor.spec.shape)

    def load_memory(self, site: str) -> int:
        """Of the sums of the inputs and of the drift; the forward has a budget of its own. Of an
        expert that may share, of those of all experts too, which are kept for the next one."""
        info = self.sites[site]
        batch = min(info.n_tokens, self._largest_batch)
        sums = statistics_memory(info.in_features, info.n_tokens, batch, self.hessians)
        if self.own_tokens_needed(site):
            sums += 4 * info.in_features * (info.in_features + HELDOUT_LIMIT + SAMPLE_LIMIT)
        if not self.drifts:
            return sums
        adds = self.places[site].adds
        stream = self.arch.hidden_size if adds else 0
        sums += 4 * batch * info.in_features  # two threads sum: what one frees, the other can't use
        if not self.sums_drift:
            quotients = 3 * info.in_features  # of this batch, and of those not yet let go of
            held = 2 * HELDOUT_LIMIT * (info.in_features + stream)  # in pieces, then in one
            return sums + 4 * (batch * (quotients + stream) + held)
        sums += drift_memory(info.in_features, stream, batch)
        if site != self._first_coupled:
            return sums
        return max(sums, 4 * info.in_features * (info.in_features + stream) + self._coupling_memory)

    @cached_property
    def _first_coupled(self) -> str | None:
        """The first site whose rows are coupled; None where none are."""
        return next(filter(self.is_coupled, self.places), None)

    def is_coupled(self, site: str) -> bool:
        """Whether the rows of a site's linears make up for one another."""
        place, first = self.places[site], len(self.arch.blocks) - COUPLED_BLOCKS
        return self.couples and place.adds and place.block >= first

    @cached_property
    def _coupling_memory(self) -> int:
        """Bytes that making the coupling takes at most, for the first site that has it: a few
        sequences run through the model, then the Fisher information of the head. (A run that goes
        on makes it for a later one, while no batches run.)"""
        residuals = 3 * 4 * FEW_TOKENS * self.arch.hidden_size  # before and behind a block, joined
        running = self.arch.block_memory(FEW_TOKENS) + self._stage_memory + PACKED
        return residuals + max(running, head_fisher_memory(self.arch))


def model_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture that the config.json beside the weights describes.

    Raises:
        InputError: no config.json, an architecture without a forward, a garbled setting, or one
            that the tensors contradict.
    """
    if not checkpoint.config:
        raise InputError(
            f"{checkpoint.folder}: no config.json, which the forward needs",
            hint="name the model folder, or bring activations with --activations",
        )
    try:
        arch = read_architecture(checkpoint.config, checkpoint.tensors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{checkpoint.folder}: config.json lacks or garbles a setting of the forward: {error}"
        ) from None
    with stated_in(str(checkpoint.path)):
        check_sizes(arch, checkpoint.specs, checkpoint.config)
    return arch


def check_head(checkpoint: Checkpoint) -> None:
    """Refuse a model that cannot predict.

    Raises:
        InputError: as of `model_architecture`; the head's tensor is missing.
    """
    arch = model_architecture(checkpoint)
    if arch.head not in checkpoint.tensors:
        raise InputError(
            f"{checkpoint.path}: no tensor {arch.head!r}, which predictions need",
            hint="where the head is the embedding, config.json has tie_word_embeddings: true",
        )


def token_source(
    checkpoint: Checkpoint,
    tokens: Tokens,
    heldout: tuple[int, int],
    *,
    feedback: bool = False,
    correct: bool = False,
    couple: bool = False,
    min_expert_tokens: int | None = None,
) -> TokenSource:
    """What a model sees on tokens; its sites are in the order of the forward.

    feedback: layers that are rounded already feed the layers after them; correct: the drift from
        the float model is then summed too; couple: so is the coupling of rows made, where it is
        known how the predictions come about
    min_expert_tokens: as of `TokenSource`

    Raises:
        InputError: no config.json, an architecture without a forward, a tensor that is missing;
            `min_expert_tokens` without experts.
    """
    arch = model_architecture(checkpoint)
    parts = batches(arch, tokens, heldout)
    places = {
        site: Place(block, number, linears, site in stage.routed, site == stage.adds)
        for block in range(len(arch.blocks) + arch.has_head(checkpoint.tensors))
        for number, stage in enumerate(stages(arch, block, parts[0].packing))
        for site, linears in stage.sites.items()
    }
    _check_experts(checkpoint, places.values(), min_expert_tokens)
    n_rows, drifts = int(parts[-1].rows.stop), feedback and correct
    n_tokens = n_rows - sum(int(part.held.sum()) for part in parts)
    unproven = []
    if drifts and n_tokens == n_rows:
        unproven = [f"none of {n_rows} tokens is held out: --drift auto is {UNPROVEN_STRENGTH}"]
    boundary = 4 * n_rows * arch.hidden_size + 4 * len(parts)
    return TokenSource(
        checkpoint,
        tokens,
        arch,
        parts,
        arch.state_memory(n_rows),
        2 * boundary,
        min_expert_tokens,
        name=tokens.name,
        sites={
            site: _site(checkpoint, arch, site, place, n_tokens, min_expert_tokens)
            for site, place in places.items()
        },
        heldout=heldout,
        files=tokens.files,
        warnings=(*tokens.warnings, *unproven),
        weak=tokens.weak,
        feedback=feedback,
        drifts=drifts,
        couples=feedback and couple and has_head_fisher(arch, checkpoint.tensors),
        places=places,
        attentions=tuple(attention.module for attention in arch.attentions),
        kv_heads=arch.attentions[0].n_kv_heads if arch.attentions else 0,
    )


def _width(checkpoint: Checkpoint, arch: Architecture, place: Place) -> int:
    name = f"{place.linears[0]}.weight"
    stored = checkpoint.tensors.get(name)
    if stored is None or len(stored.spec.shape) != 2:
        raise InputError(
            f"{checkpoint.path}: no tensor {name!r}, which config.json's model_type"
            f" {arch.family!r} has",
            hint="bring activations with --activations, which works for any model",
        )
    transposed = arch.transposed and place.block < len(arch.blocks)  # behind them is the head
    return stored.spec.shape[0 if transposed else 1]


def _check_experts(checkpoint: Checkpoint, places: Iterable[Place], least: int | None) -> None:
    if least is not None and not any(place.expert for place in places):
        raise InputError(
            f"--min-expert-tokens {least} does nothing here",
            hint=f"{checkpoint.path} has no experts",
        )


def _own_tokens_needed(in_features: int, least: int | None) -> int:
    """Tokens that an expert needs for statistics of its own. least: as of `TokenSource`"""
    return ceil(in_features / 8) if least is None else least


def _site(
    checkpoint: Checkpoint,
    arch: Architecture,
    site: str,
    place: Place,
    n_tokens: int,
    min_expert_tokens: int | None,
) -> SiteInfo:
    """What is known of a site. Experts get an equal share of the tokens, as far as one can say
    beforehand; where that is too few, they share the statistics of all."""
    in_features = _width(checkpoint, arch, place)
    experts = arch.blocks[place.block].experts if place.expert else None
    if experts is None:
        return SiteInfo(site, place.linears, in_features, n_tokens)
    routed = n_tokens * experts.top_k
    own = routed // len(experts.experts)
    if own < _own_tokens_needed(in_features, min_expert_tokens):
        return SiteInfo(site, place.linears, in_features, routed, own)
    return SiteInfo(site, place.linears, in_features, own)
