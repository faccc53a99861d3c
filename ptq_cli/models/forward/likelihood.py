"""How well a model predicts the next token, and how far two models' predictions lie apart.

The vocabulary goes by in pieces, rows of the head in chunks, so that neither the head nor the
logits of all tokens are ever held whole in float32; running maxima keep the exponentials in range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.models.forward.architecture import Architecture
from ptq_cli.models.forward.attention import Packing
from ptq_cli.models.forward.layers import Weights
from ptq_cli.models.forward.stages import logits

Doubles = NDArray[np.float64]
VOCABULARY = 1 << 14  # tokens whose logits are computed together
LOGITS = 1 << 23  # values of a chunk of logits (32 MiB), at most
LARGE = 20.0  # differences of logits, in nats


@dataclass(frozen=True)
class Prediction:
    """One model's part: finished hidden states ([n, width], `finish`) and where its head is."""

    arch: Architecture
    weights: Weights
    finished: FloatArray


@dataclass(frozen=True)
class TokenMeasures:
    """Per predicted token, [n]: negative log-likelihood in nats, KL(reference ‖ this) in nats, the
    token thought most likely, and the reference's nll and top."""

    nll: Doubles
    top: NDArray[np.int64]
    kl: Doubles
    reference_nll: Doubles
    reference_top: NDArray[np.int64]

    @property
    def same_top(self) -> float:
        """Share of tokens for which both models think the same one most likely."""
        return float(np.mean(self.top == self.reference_top))


def next_tokens(tokens: Array, packing: Packing) -> tuple[NDArray[np.int64], Array]:
    """Packed rows that have a token after them in their sequence, and that token, [n] each."""
    sequences = np.nonzero(packing.mask)[0]
    rows = np.nonzero(sequences[1:] == sequences[:-1])[0]
    return rows, packing.flat(tokens)[rows + 1]


def measure_tokens(model: Prediction, targets: Array, reference: Prediction) -> TokenMeasures:
    """The measures of predicting `targets` [n] from the rows of `model.finished` [n, width]."""
    total = _Softmax(len(targets))
    base = _Softmax(len(targets))
    for ids, rows in _pieces(model.arch.vocab_size, len(targets)):
        scores, wanted = _scores(model, ids, rows), _scores(reference, ids, rows)
        total.add(scores, ids.start, rows, targets)
        scores -= wanted
        base.add(wanted, ids.start, rows, targets, scores)
    mean = base.weighted / base.total  # of the difference of the scores
    kl = np.maximum(total.log_sum - base.log_sum - mean, 0.0)  # below 0 only by rounding
    return TokenMeasures(total.nll, total.top, kl, base.nll, base.top)


def _scores(model: Prediction, ids: slice, rows: slice) -> FloatArray:
    return logits(model.arch, model.weights, model.finished[rows], ids)


def _pieces(n_ids: int, n_rows: int) -> Iterator[tuple[slice, slice]]:
    for first in range(0, n_ids, VOCABULARY):
        ids = slice(first, min(first + VOCABULARY, n_ids))
        step = LOGITS // (ids.stop - ids.start)
        for start in range(0, n_rows, step):
            yield ids, slice(start, min(start + step, n_rows))


def divergences(reference: Prediction, models: Sequence[Prediction]) -> Doubles:
    """Mean KL(reference ‖ model) of each model, [n_models], in nats: of versions of one model on
    the same tokens.

    With d the difference of the logits and p what the reference predicts, KL = log Σ p·e^d − Σ p·d:
    small differences keep their digits. Beyond some 700 nats it is infinite.
    """
    arch, n_rows = reference.arch, len(reference.finished)
    peak, total = np.full(n_rows, -np.inf), np.zeros(n_rows)
    for ids, rows in _pieces(arch.vocab_size, n_rows):
        wanted = _scores(reference, ids, rows)
        highest = np.maximum(peak[rows], wanted.max(axis=1))
        total[rows] *= np.exp(peak[rows] - highest)
        total[rows] += np.exp(wanted - highest[:, None]).sum(axis=1, dtype=np.float64)
        peak[rows] = highest
    normed = peak + np.log(total)
    grown, moved = np.zeros((2, len(models), n_rows))
    for ids, rows in _pieces(arch.vocab_size, n_rows):
        wanted = _scores(reference, ids, rows)
        log_shares = wanted - normed[rows, None].astype(np.float32)
        shares = np.exp(log_shares)
        for own, model in enumerate(models):
            change = _scores(model, ids, rows)
            change -= wanted
            moved[own, rows] += np.einsum("ij,ij->i", shares, change, dtype=np.float64)
            grown[own, rows] += _growth(shares, log_shares, change)
    found: Doubles = np.maximum(np.log1p(grown) - moved, 0.0).mean(axis=1)
    return found


def _growth(shares: FloatArray, log_shares: FloatArray, change: FloatArray) -> Doubles:
    """Σ p·(e^d − 1) of each row; `change`, d, is overwritten. Where some d is large, p may be too
    small for float32 and e^d too large, but not their product for float64."""
    if change.max() > LARGE:
        with np.errstate(over="ignore"):
            whole = np.exp(log_shares.astype(np.float64) + change).sum(axis=1)
        return np.asarray(whole - shares.sum(axis=1, dtype=np.float64))
    np.expm1(change, out=change)
    return np.asarray(np.einsum("ij,ij->i", shares, change, dtype=np.float64))


class _Softmax:
    """A softmax per row whose logits arrive in pieces: `Σ exp(logit − peak)`, the target's logit
    and the same sum weighted by a second array that arrives beside the logits."""

    def __init__(self, n_rows: int) -> None:
        self.peak = np.full(n_rows, -np.inf, dtype=np.float64)
        self.total = np.zeros(n_rows, dtype=np.float64)
        self.weighted = np.zeros(n_rows, dtype=np.float64)
        self.target = np.full(n_rows, np.nan, dtype=np.float64)
        self.top = np.zeros(n_rows, dtype=np.int64)

    @property
    def log_sum(self) -> Doubles:
        return self.peak + np.log(self.total)

    @property
    def nll(self) -> Doubles:
        return self.log_sum - self.target

    def add(
        self, scores: FloatArray, first: int, rows: slice, targets: Array, beside: Any = None
    ) -> None:
        """A piece: `scores` and `beside` [rows, n] for the tokens from `first` on."""
        own = np.asarray(targets[rows], dtype=np.int64) - first
        here = np.nonzero((own >= 0) & (own < scores.shape[1]))[0]
        self.target[rows][here] = scores[here, own[here]]
        best = scores.argmax(axis=1)
        highest = scores[np.arange(len(scores)), best].astype(np.float64)
        higher = highest > self.peak[rows]
        self.top[rows] = np.where(higher, best + first, self.top[rows])
        peak = np.maximum(self.peak[rows], highest)
        shrink = np.exp(self.peak[rows] - peak)
        parts = np.exp(scores - peak[:, None].astype(np.float32))
        self.total[rows] = self.total[rows] * shrink + parts.sum(axis=1, dtype=np.float64)
        if beside is not None:
            parts *= beside
            more = parts.sum(axis=1, dtype=np.float64)
            self.weighted[rows] = self.weighted[rows] * shrink + more
        self.peak[rows] = peak
