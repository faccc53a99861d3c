"""What changes of a few tensors do to the predictions: the float model on a few tokens, and beside
it a version for each trial, which has other tensors in one block.

All versions go through a block together, so that its weights are read once. A trial starts from
what the float model has before its block, and differs from it from there on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ptq_cli.calibration.from_tokens import TokenSource
from ptq_cli.calibration.stream import Decode, Held
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.forward.attention import Packing, pack
from ptq_cli.models.forward.likelihood import Prediction, divergences
from ptq_cli.models.forward.stages import embed, finish, forward_block
from ptq_cli.numerics.drift import corrected_stream

LENGTH = 256  # tokens of a sequence, at most
LOST = 1e3  # nats: a divergence beyond which nothing of the predictions is left

Changed = Mapping[str, Decode]  # what gives the tensors that are others, by name
Trial = tuple[str, str]  # what is changed, and how
_EXACT = ("", "")


class Trials:
    """The float model and its versions before the same block.

    n_tokens: to run on: sequences evenly spaced among those of the source, cut to LENGTH
    block: the one in hand; len(blocks) behind the last
    """

    def __init__(self, source: TokenSource, n_tokens: int, n_threads: int) -> None:
        self.arch, self.n_threads, self.block = source.arch, n_threads, 0
        self._read = source.checkpoint.read
        self.tokens, self.packing = tokens_to_try(source, n_tokens)
        self._exact = self._embedded({})
        self._states: dict[Trial, FloatArray] = {}
        self._heads: dict[Trial, Changed] = {}  # of trials that change the head, too

    @property
    def n_tokens(self) -> int:
        """That the versions run on."""
        return self.packing.n_tokens

    @property
    def state_bytes(self) -> int:
        """Of a version between two blocks."""
        return 4 * self.n_tokens * self.arch.hidden_size

    def __len__(self) -> int:
        """Trials that are on their way."""
        return len(self._states)

    @property
    def nbytes(self) -> int:
        """Of all versions."""
        return len(self) * self.state_bytes

    def embed(self, trials: Mapping[Trial, Changed]) -> None:
        """Begin trials that have another embedding. No block has been gone through yet."""
        for key, changed in trials.items():
            self._states[key] = self._embedded(changed)
        self._keep_heads(trials)

    def _keep_heads(self, trials: Mapping[Trial, Changed]) -> None:
        """All else that is changed is done with when its block is."""
        self._heads |= {key: own for key, own in trials.items() if self.arch.head in own}

    def _embedded(self, changed: Changed) -> FloatArray:
        weights = Held(self._read, float32=False, instead=changed)
        return embed(self.arch, weights, self.tokens, self.packing)

    def advance(self, trials: Mapping[Trial, Changed], corrected: Collection[Trial] = ()) -> None:
        """Everything goes through the block in hand, or, behind the last block, to the end; trials
        begin with other tensors in it.

        corrected: of these trials, those which layers that are rounded later make up for
        """
        self._keep_heads(trials)
        self._states |= dict.fromkeys(trials, self._exact)
        if self.block < len(self.arch.blocks):
            through = self._through(self.block, {_EXACT: self._exact, **self._states}, trials)
            self._exact, self._states = through.pop(_EXACT), through
            self.block += 1
            for key in corrected:
                self._states[key] = corrected_stream(self._states[key], self._exact)

    def _through(
        self, block: int, states: Mapping[Trial, FloatArray], trials: Mapping[Trial, Changed] = {}
    ) -> dict[Trial, FloatArray]:
        """Versions through a block, those of `trials` with other tensors."""
        shared = Held(self._read)

        def work(key: Trial) -> FloatArray:
            changed = trials.get(key)
            weights = shared if changed is None else Held(shared, instead=changed)
            return forward_block(self.arch, block, weights, states[key], self.packing)

        with ThreadPoolExecutor(self.n_threads) as pool:
            return dict(zip(states, pool.map(work, states), strict=True))

    def divergences(self) -> dict[Trial, float]:
        """Take the trials from the block in hand to the end: the mean KL divergence of each one's
        predictions from the float model's, in nats. They are then done with; the float model stays
        where it is."""
        states = {_EXACT: self._exact, **self._states}
        for block in range(self.block, len(self.arch.blocks)):
            states = self._through(block, states)
        shared = Held(self._read, float32=False)  # a large head goes by in pieces
        versions = {}
        for key, hidden in states.items():
            head = self._heads.get(key)
            weights = shared if head is None else Held(shared, instead=head)
            versions[key] = Prediction(self.arch, weights, finish(self.arch, weights, hidden))
        exact = versions.pop(_EXACT)
        found = divergences(exact, list(versions.values()))
        self._states, self._heads = {}, {}
        found = np.nan_to_num(np.minimum(found, LOST), nan=LOST)  # a number, whatever broke
        return dict(zip(versions, map(float, found), strict=True))


def tokens_to_try(source: TokenSource, n_tokens: int) -> tuple[Array, Packing]:
    """About so many of the source's tokens, or all: sequences, evenly spaced, cut to LENGTH, and
    how they are packed. Raises InputError where none counts."""
    ids, mask = source.tokens.sequences(slice(None))
    length = min(LENGTH, ids.shape[1])
    count = min(len(ids), max(1, n_tokens // length))
    rows = np.arange(count) * len(ids) // count
    starts = mask[rows].argmax(axis=1) if len(mask) else np.zeros(count, np.intp)
    columns = np.minimum(starts, ids.shape[1] - length)[:, None] + np.arange(length)
    own = np.take_along_axis(mask[rows], columns, axis=1)
    if not own.any():
        raise InputError(f"{source.name}: no token to try choices on")
    return np.take_along_axis(ids[rows], columns, axis=1), pack(own.shape, own)
