"""What a change of the residual stream does to the predictions: the Fisher information of the head.

With logits `z = head · norm(stream)` and p their softmax, predictions of a token move by
`KL ≈ ½ δzᵀ (diag(p) − p pᵀ) δz`. The norm's root mean square hardly moves, so with g its gain

    F = mean over tokens of g Wᵀ (diag(p) − p pᵀ) W g / rms²

weighs changes of the stream behind the last block. Before that it takes the blocks that follow for
the identity: blocks add to the stream, so for a few of them that is not far off.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.architecture import Architecture
from ptq_cli.models.forward.layers import Weights
from ptq_cli.models.forward.likelihood import VOCABULARY
from ptq_cli.models.forward.stages import finish, logits
from ptq_cli.numerics.parallel import each, pieces, strips

TOKENS_AT_ONCE = 256
# Pieces of work: of the vocabulary, of the tokens at once, of the columns of F.
IDS_IN_PIECE = 1 << 11
TOKENS_IN_PIECE = 64
COLUMNS_IN_PIECE = 192


def has_head_fisher(arch: Architecture, tensors: Collection[str]) -> bool:
    """Whether the predictions are a head behind a norm, and nothing else, and both are there.

    tensors: names in the checkpoint
    """
    norm = arch.final_norm
    if norm is None or arch.projections or arch.logit_softcap is not None:
        return False
    return arch.head in tensors and (not norm.affine or f"{norm.name}.weight" in tensors)


def head_fisher_memory(arch: Architecture) -> int:
    """Bytes that `head_fisher` takes at most, its inputs aside: probabilities, rows of the head (as
    many at once as the pieces of all threads have at most), logits of a piece, sums."""
    rows = min(VOCABULARY, arch.vocab_size)
    width = arch.hidden_size
    scores = TOKENS_AT_ONCE * (arch.vocab_size + rows)
    return 4 * (scores + 2 * rows * width + 4 * width * width)


def head_fisher(arch: Architecture, weights: Weights, hidden: FloatArray) -> NDArray[np.float32]:
    """F, [hidden_size, hidden_size].

    hidden: the residual behind the last block, float32 [n_tokens, hidden_size]
    """
    norm = arch.final_norm
    assert norm is not None  # `has_head_fisher` said so
    finished, inverse = finish(arch, weights, hidden), layers.centred_and_scale(norm, hidden)[1]
    table = layers.stored(weights, arch.head)
    mass = np.zeros(len(table), np.float32)
    fisher = np.zeros((arch.hidden_size, arch.hidden_size), np.float32)
    for rows in strips(len(hidden), TOKENS_AT_ONCE):
        share = _shares(arch, weights, finished[rows])
        share *= inverse[rows, None]
        mass += inverse[rows] @ share
        mean = _mean(share, table)
        fisher -= mean.T @ mean
    for ids in strips(len(table), VOCABULARY):
        _add_gram(fisher, _scaled(table[ids], np.sqrt(mass[ids, None])))
    fisher = np.tril(fisher) + np.tril(fisher, -1).T
    if norm.affine:
        gain = layers.fetch(weights, f"{norm.name}.weight") + np.float32(norm.offset)
        fisher *= gain
        fisher *= gain[:, None]
    if norm.centred:  # a change that all channels share is taken out again
        fisher -= fisher.mean(axis=0)
        fisher -= fisher.mean(axis=1, keepdims=True)
    fisher /= np.float32(len(hidden))
    return fisher


def _shares(arch: Architecture, weights: Weights, finished: FloatArray) -> NDArray[np.float32]:
    """Probabilities of the tokens of the vocabulary, [n_tokens, vocab_size]."""
    vocabulary = len(layers.stored(weights, arch.head))
    share = np.empty((len(finished), vocabulary), np.float32)

    def score(ids: slice) -> None:
        share[:, ids] = logits(arch, weights, finished, ids)

    def normalize(rows: slice) -> None:
        share[rows] -= share[rows].max(axis=1, keepdims=True)
        np.exp(share[rows], out=share[rows])
        share[rows] /= share[rows].sum(axis=1, keepdims=True)

    each(score, strips(vocabulary, IDS_IN_PIECE))
    each(normalize, pieces(0, len(share), vocabulary))
    return share


def _mean(share: NDArray[np.float32], table: Array) -> NDArray[np.float32]:
    """`share · table`. share: [n_tokens, vocab_size]; table: [vocab_size, width]"""
    mean = np.zeros((len(share), table.shape[1]), np.float32)
    for ids in strips(len(table), VOCABULARY):
        rows = _scaled(table[ids])

        def add(tokens: slice, ids: slice = ids, rows: FloatArray = rows) -> None:
            mean[tokens] += share[tokens, ids] @ rows

        each(add, strips(len(share), TOKENS_IN_PIECE))
    return mean


def _scaled(rows: Array, scale: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Rows as float32, each times its scale. rows: [n, width]; scale: [n, 1], or None for 1"""
    scaled = np.empty(rows.shape, np.float32)

    def fill(some: slice) -> None:
        scaled[some] = rows[some]
        if scale is not None:
            scaled[some] *= scale[some]

    each(fill, pieces(0, len(rows), rows.shape[1]))
    return scaled


def _add_gram(gram: NDArray[np.float32], rows: NDArray[np.float32]) -> None:
    """Add `rowsᵀ · rows` to the lower triangle. rows: [n, width]"""

    def add(own: slice) -> None:
        gram[own, : own.stop] += rows[:, own].T @ rows[:, : own.stop]

    each(add, reversed(strips(len(gram), COLUMNS_IN_PIECE)))  # the longest first
