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

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.architecture import Architecture
from ptq_cli.models.forward.layers import Weights
from ptq_cli.models.forward.likelihood import VOCABULARY
from ptq_cli.models.forward.stages import finish, logits
from ptq_cli.numerics.parallel import strips

TOKENS_AT_ONCE = 256


def has_head_fisher(arch: Architecture, tensors: Collection[str]) -> bool:
    """Whether the predictions are a head behind a norm, and nothing else, and both are there.

    tensors: names in the checkpoint
    """
    norm = arch.final_norm
    if norm is None or arch.projections or arch.logit_softcap is not None:
        return False
    return arch.head in tensors and (not norm.affine or f"{norm.name}.weight" in tensors)


def head_fisher_memory(arch: Architecture) -> int:
    """Bytes that `head_fisher` takes at most, its inputs aside: probabilities, logits of a piece,
    rows of the head and the same weighted, sums."""
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
    pieces = strips(len(table), VOCABULARY)
    mass = np.zeros(len(table), np.float32)
    fisher = np.zeros((arch.hidden_size, arch.hidden_size), np.float32)
    for rows in strips(len(hidden), TOKENS_AT_ONCE):
        share = np.empty((rows.stop - rows.start, len(table)), np.float32)
        for ids in pieces:
            share[:, ids] = logits(arch, weights, finished[rows], ids)
        share -= share.max(axis=1, keepdims=True)
        np.exp(share, out=share)
        share *= inverse[rows, None] / share.sum(axis=1, keepdims=True)
        mass += inverse[rows] @ share
        mean = np.zeros((len(share), arch.hidden_size), np.float32)
        for ids in pieces:
            mean += share[:, ids] @ np.asarray(table[ids], np.float32)
        fisher -= mean.T @ mean
    for ids in pieces:
        part = np.asarray(table[ids], np.float32) * np.sqrt(mass[ids, None])
        fisher += part.T @ part
    if norm.affine:
        gain = layers.fetch(weights, f"{norm.name}.weight") + np.float32(norm.offset)
        fisher *= gain
        fisher *= gain[:, None]
    if norm.centred:  # a change that all channels share is taken out again
        fisher -= fisher.mean(axis=0)
        fisher -= fisher.mean(axis=1, keepdims=True)
    fisher /= np.float32(len(hidden))
    return fisher
