"""Statistics of a site's inputs: streamed in chunks, mergeable, each computed once.

The Hessian `inputs.T @ inputs / n_tokens` (GPTQ does not feel the paper's factor 2) is summed in
float32 over chunks of a fixed number of tokens. Only its lower triangle is computed: blocks left of
the diagonal by a matrix product, blocks on it by numpy's symmetric product.

Held-out inputs enter no statistic; the report measures errors on them. They are every
`heldout_every`-th token, until `heldout_limit` of them are kept; tokens after that all enter. Where
whole sequences are known, these are held out instead, as tokens tell of their neighbours
(`heldout_tokens`). Two halves merge to the whole: what the merged sample has no room for is added
to the statistics then.

The sample: tokens that *are* in the statistics, evenly spaced, at most `SAMPLE_LIMIT`, kept for
searches that need inputs themselves (the held-out ones judge what a search has found). Every
2^k-th token is kept, with the least k that stays within the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.statistics import Drift, SiteStatistics
from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError
from ptq_cli.numerics.distribution import DistributionSum, merge_distributions
from ptq_cli.numerics.parallel import each, equal_strips, strips

CHUNK_TOKENS = 4096  # multiplied at a time: enough to make up for adding what they give
CHUNK_ELEMENTS = 1 << 25  # of wide inputs fewer, so that they are 128 MiB at most
PIECE_ELEMENTS = 1 << 18  # inputs read, converted and looked at one by one: they stay in the cache
BLOCK_COLUMNS = 512  # of the Hessian, at most, computed at a time
HELDOUT_EVERY = 8
HELDOUT_LIMIT = 512
SAMPLE_LIMIT = 512


def piece_tokens(in_features: int) -> int:
    """Tokens to read and hand to `SiteAccumulator.update` at a time."""
    return max(1, PIECE_ELEMENTS // max(1, in_features))


def _chunk_tokens(in_features: int) -> int:
    """Tokens that are multiplied at a time."""
    return min(CHUNK_TOKENS, max(256, CHUNK_ELEMENTS // max(1, in_features)))


def statistics_memory(in_features: int, n_tokens: int, at_once: int = 0, whole: bool = True) -> int:
    """Bytes that the accumulator of so many tokens of a site takes at most.

    at_once: tokens handed to it at a time, where they are more than `piece_tokens`; counted are
        those not held out
    whole: as of `SiteAccumulator`
    """
    if not whole:
        elements = in_features * (in_features + at_once + 4 * SAMPLE_LIMIT) + 8 * PIECE_ELEMENTS
        return 4 * elements
    rows = min(n_tokens, _chunk_tokens(in_features)) + at_once
    blocks = 2 * min(BLOCK_COLUMNS, in_features) * in_features
    elements = in_features * (in_features + rows + 4 * SAMPLE_LIMIT) + blocks + 8 * PIECE_ELEMENTS
    return 4 * elements


def calibration_tokens(n_seen: int, heldout: tuple[int, int]) -> int:
    """Of `n_seen` tokens, those that enter the statistics. heldout: every how many one is held out,
    and how many at most"""
    every, limit = heldout
    return n_seen - min(limit, n_seen // every if every else 0)


def heldout_tokens(lengths: Sequence[int], heldout: tuple[int, int]) -> NDArray[np.bool_]:
    """Which tokens of sequences one after the other are held out, bool [n_tokens].

    Whole sequences, evenly spaced: every n-th, or fewer, so that they have about as many tokens as
    are asked for at most; where there are too few sequences for that, the last tokens of all.

    lengths: of the sequences; heldout: every how many one is held out, and how many tokens at most
    """
    every, limit = heldout
    n_tokens, chosen = sum(lengths), np.zeros(sum(lengths), np.bool_)
    count = min(limit, n_tokens // every if every else 0)
    if count == 0:
        return chosen
    starts = np.cumsum([0, *lengths])
    step = max(every, ceil(n_tokens / limit))
    for number in range(step - 1, len(lengths), step):
        chosen[starts[number] : starts[number + 1]] = True
    if not chosen.any():
        chosen[n_tokens - count :] = True
    chosen[np.flatnonzero(chosen)[count:]] = False
    return chosen


class NonFiniteInput(InputError):
    """The inputs hold NaN or inf. `token` and `channel` say where it is first met."""

    def __init__(self, token: int, channel: int, value: float) -> None:
        super().__init__(f"inputs hold {value} at token {token}, channel {channel}")
        self.token, self.channel, self.value = token, channel, value


class SiteAccumulator:
    """Sums over the inputs of one site. Feed it with `update`, a piece at a time, then `result`.

    Pieces are gathered to chunks of a size that depends on the width alone, so that the sums depend
    neither on the pieces nor on the machine.

    described: the distribution of the values is wanted too
    whole: so is all of the Hessian; else only its diagonal, and the rest of it is zero
    first, total: where these are but a part of a site's `total` tokens, the place of the first:
        tokens are held out, and taken as samples, so that merged parts have those of the whole
    """

    def __init__(
        self,
        in_features: int,
        heldout_every: int = HELDOUT_EVERY,
        heldout_limit: int = HELDOUT_LIMIT,
        first: int = 0,
        total: int | None = None,
        described: bool = False,
        whole: bool = True,
    ) -> None:
        self.in_features, self._first = in_features, first
        self._every = heldout_every
        self._squares = None if whole else np.zeros(in_features, np.float64)
        self.hessian = np.zeros((in_features, in_features) if whole else (0, 0), np.float32)
        self.n_tokens, self.n_seen = 0, first
        self.low = np.full(in_features, np.inf, np.float32)
        self.high = np.full(in_features, -np.inf, np.float32)
        self.sum_abs = np.zeros(in_features, np.float64)
        self._distribution = DistributionSum() if described else None
        self._heldout: list[Array] = []
        heldout = heldout_every, heldout_limit
        self._before = calibration_tokens(first, heldout)  # in the statistics of other parts
        self._room = heldout_limit - (first - self._before)
        self._sampled: list[Array] = []
        self._stride = 1
        while calibration_tokens(total or 0, heldout) > SAMPLE_LIMIT * self._stride:
            self._stride *= 2
        rows = _chunk_tokens(in_features) if whole else piece_tokens(in_features)
        self._chunk = np.empty((rows, in_features), np.float32)
        self._filled = 0

    def update(self, inputs: Array, held: NDArray[np.bool_] | None = None) -> None:
        """Take in the next tokens, [n, in_features] of any float dtype.

        held: [n], those that are held out, where that is not every n-th

        Raises:
            NonFiniteInput: there is NaN or inf; the accumulator is then of no more use.
        """
        rest = self._hold_out(inputs, self._due(len(inputs)) if held is None else held)
        step = piece_tokens(self.in_features)
        while len(rest):
            part = rest[: min(step, len(self._chunk) - self._filled)]
            rest = rest[len(part) :]
            piece = self._chunk[self._filled : self._filled + len(part)]
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(piece, part, casting="same_kind")
                if not np.isfinite(piece.sum()):
                    self._locate(inputs)
            self._take_sample(part)
            self._add_elements(piece)
            self.n_tokens += len(piece)
            self._filled += len(piece)
            if self._filled == len(self._chunk):
                self._multiply()
        self.n_seen += len(inputs)

    def _due(self, count: int) -> NDArray[np.bool_]:
        """Which of the next tokens are held out: every n-th, as long as there is room."""
        due = np.zeros(count, np.bool_)
        if self._every > 0:
            due[-(self.n_seen + 1) % self._every :: self._every] = True
            due[np.flatnonzero(due)[self._room :]] = False
            self._room -= int(due.sum())
        return due

    def _hold_out(self, inputs: Array, held: NDArray[np.bool_]) -> Array:
        """Keep the held-out tokens; the others are given back."""
        if not held.any():
            return inputs
        kept = inputs[held]
        if not np.isfinite(kept).all():
            self._locate(inputs)
        self._heldout.append(kept)
        return inputs[~held]

    def _take_sample(self, inputs: Array) -> None:
        """Keep every `_stride`-th calibration token; where they become too many, every second."""
        first = -(self._before + self.n_tokens) % self._stride
        self._sampled.append(inputs[first :: self._stride].copy())
        while sum(map(len, self._sampled)) > SAMPLE_LIMIT:
            self._sampled = [np.concatenate(self._sampled)[::2]]
            self._stride *= 2

    def _locate(self, inputs: Array) -> None:
        """Raise where a value is not finite (a sum that merely overflows is fine)."""
        values = inputs.astype(np.float32)
        for token, channel in np.argwhere(~np.isfinite(values))[:1]:
            value = float(values[token, channel])
            raise NonFiniteInput(self.n_seen + int(token), int(channel), value)

    def _add_elements(self, piece: NDArray[np.float32]) -> None:
        np.minimum(self.low, piece.min(axis=0), out=self.low)
        np.maximum(self.high, piece.max(axis=0), out=self.high)
        with np.errstate(over="ignore", invalid="ignore"):  # `result` finds an overflow
            self.sum_abs += np.ones(len(piece), np.float32) @ np.abs(piece)
        if self._distribution is not None:
            self._distribution.update(piece)

    def _multiply(self) -> None:
        """Add the lower triangle of `chunk.T @ chunk`, a block of columns at a time; or its
        diagonal."""
        chunk, self._filled = self._chunk[: self._filled], 0
        if len(chunk) == 0:
            return
        if self._squares is not None:
            with np.errstate(over="ignore"):  # `result` finds it
                self._squares += np.einsum("ij,ij->j", chunk, chunk)
            return

        def add(rows: slice) -> None:
            block, before = chunk[:, rows], slice(0, rows.start)
            with np.errstate(over="ignore", invalid="ignore"):  # `result` finds an overflow
                if rows.start:
                    self.hessian[rows, before] += block.T @ chunk[:, before]
                self.hessian[rows, rows] += block.T @ block

        # The last blocks are the longest, so they come first.
        each(add, reversed(equal_strips(self.in_features, BLOCK_COLUMNS)))

    def result(self, site: str, linears: tuple[str, ...]) -> SiteStatistics:
        """The statistics so far. The accumulator is used up: its Hessian is handed over.

        Raises:
            InputError: there was no token, or the sums left the range of float32.
        """
        self._multiply()
        if self._squares is not None:
            with np.errstate(over="ignore"):
                self.hessian = np.diag(self._squares.astype(np.float32))
        if self.n_tokens == 0:
            raise InputError(
                f"{site}: no tokens to calibrate on ({self.n_seen - self._first} seen)"
            )
        if not np.isfinite(self.hessian.diagonal()).all():
            raise InputError(
                f"{site}: inputs up to {float(max(-self.low.min(), self.high.max())):.3g} overflow"
                " float32 when squared",
                hint="scale the activations down",
            )
        if self._squares is None:
            _mirror(self.hessian)
        distribution = None
        if self._distribution is not None:
            low, high = float(self.low.min()), float(self.high.max())
            squares = float(self.hessian.diagonal().astype(np.float64).sum())
            distribution = self._distribution.result(low, high, squares)
        self.hessian /= np.float32(self.n_tokens)
        return SiteStatistics(
            site=site,
            linears=linears,
            hessian=self.hessian,
            n_tokens=self.n_tokens,
            n_seen=self.n_seen - self._first,
            absmax=np.maximum(-self.low, self.high),
            absmean=(self.sum_abs / self.n_tokens).astype(np.float32),
            heldout=self._joined(self._heldout),
            sample=self._joined(self._sampled),
            distribution=distribution,
        )

    def _joined(self, pieces: list[Array]) -> Array:
        if not pieces:
            return np.zeros((0, self.in_features), np.float32)
        tokens = np.concatenate(pieces)
        return tokens.astype(np.float32) if tokens.dtype.itemsize > 4 else tokens


def _mirror(matrix: NDArray[np.float32]) -> None:
    """Copy the lower triangle of blocks to the upper one, in place."""
    for rows in equal_strips(len(matrix), BLOCK_COLUMNS):
        matrix[: rows.start, rows] = matrix[rows, : rows.start].T


def merge(
    first: SiteStatistics, second: SiteStatistics, limit: int, whole: bool = True
) -> SiteStatistics:
    """Statistics of all the data of both, as if calibrated in one go (`first`'s data first).

    limit: tokens that are held out at most; whole: as of `SiteAccumulator`

    Raises:
        InputError: the two differ in site or width.
    """
    if first.site != second.site or first.in_features != second.in_features:
        raise InputError(
            f"cannot merge site {first.site} [{first.in_features}]"
            f" with {second.site} [{second.in_features}]"
        )
    room = max(0, limit - len(first.heldout))
    surplus, second = second.heldout[room:], replace(second, heldout=second.heldout[:room])
    if len(surplus):
        described = second.distribution is not None
        sums = SiteAccumulator(first.in_features, heldout_every=0, described=described, whole=whole)
        sums.update(surplus)
        extra = sums.result(second.site, second.linears)
        own = None if second.own_tokens is None else 0
        extra = replace(extra, n_seen=0, heldout=surplus[:0], own_tokens=own)
        second = _combine(second, extra)
    return _combine(first, second)


def _stacked(first: Array, second: Array) -> Array:
    if not len(first) or not len(second):  # nothing has no dtype to speak of
        return first if len(first) else second
    dtype = np.result_type(first, second)
    return np.concatenate([first.astype(dtype), second.astype(dtype)])


def _merged_sample(a: SiteStatistics, b: SiteStatistics) -> Array:
    """Tokens of both samples, in proportion to the tokens behind them, evenly spaced."""
    total = min(SAMPLE_LIMIT, len(a.sample) + len(b.sample))
    of_a = round(total * a.n_tokens / (a.n_tokens + b.n_tokens))
    of_a = min(len(a.sample), max(of_a, total - len(b.sample)))
    return _stacked(_thinned(a.sample, of_a), _thinned(b.sample, total - of_a))


def _thinned(tokens: Array, count: int) -> Array:
    return tokens[np.arange(count) * len(tokens) // max(1, count)]


def _combine(a: SiteStatistics, b: SiteStatistics) -> SiteStatistics:
    n = a.n_tokens + b.n_tokens
    of_a, of_b = a.n_tokens / n, b.n_tokens / n
    hessian = a.hessian * np.float32(of_a)
    for rows in strips(len(hessian), BLOCK_COLUMNS):
        hessian[rows] += b.hessian[rows] * np.float32(of_b)
    return SiteStatistics(
        site=a.site,
        linears=a.linears,
        hessian=hessian,
        n_tokens=n,
        n_seen=a.n_seen + b.n_seen,
        absmax=np.maximum(a.absmax, b.absmax),
        absmean=(of_a * a.absmean + of_b * b.absmean).astype(np.float32),
        heldout=_stacked(a.heldout, b.heldout),
        sample=_merged_sample(a, b),
        distribution=merge_distributions(a.distribution, b.distribution, of_a),
        own_tokens=_own_tokens(a, b),
    )


def _own_tokens(a: SiteStatistics, b: SiteStatistics) -> int | None:
    """Of the merged statistics; None where both are the site's own."""
    if a.own_tokens is None and b.own_tokens is None:
        return None
    return sum(s.n_tokens if s.own_tokens is None else s.own_tokens for s in (a, b))


def smoothed(statistics: SiteStatistics, factors: Array) -> SiteStatistics:
    """Statistics of `inputs / factors`, factors [in_features]; the float model's are divided too.

    How its values are distributed is not known.
    """
    divisor = factors.astype(np.float32)
    sample = statistics.sample.astype(np.float32) / divisor
    hessian = statistics.hessian / divisor
    hessian /= divisor[:, None]
    drift = None if statistics.drift is None else _smoothed_drift(statistics.drift, divisor)
    return replace(
        statistics,
        hessian=hessian,
        absmax=statistics.absmax / divisor,
        absmean=statistics.absmean / divisor,
        distribution=None,
        heldout=statistics.heldout.astype(np.float32) / divisor,
        sample=sample,
        drift=drift,
    )


def _smoothed_drift(drift: Drift, divisor: NDArray[np.float32]) -> Drift:
    inputs = None if drift.inputs is None else drift.inputs / divisor / divisor[:, None]
    outputs = None if drift.outputs is None else drift.outputs / divisor
    return replace(drift, inputs=inputs, heldout=drift.heldout / divisor, outputs=outputs)
