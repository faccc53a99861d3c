"""From a router's scores to the shares with which experts take part in a token.

Scores are float32 [n_tokens, n_experts], what the router's linear gives, its bias included. Shares
have the same shape and are 0 for the experts that a token does not go to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward.layers import sigmoid


@dataclass(frozen=True)
class Groups:
    """Neighbouring experts in groups of one size: a token goes to experts of its best groups only.

    count: of groups, a divisor of the number of experts
    kept: groups that a token may go to
    """

    count: int
    kept: int


def softmax_router(
    scores: FloatArray,
    top_k: int,
    *,
    normalised: bool = False,
    groups: Groups | None = None,
    factor: float = 1.0,
) -> FloatArray:
    """The `top_k` largest of the softmax of the scores, times `factor`.

    normalised: their sum becomes 1 first: the softmax of the `top_k` scores alone (gpt-oss)
    groups: the best have the largest share of an expert (DeepSeek-V2)
    """
    shares: FloatArray = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    if groups is not None:
        shares = np.where(_in_best_groups(shares, groups, 1), shares, 0)
    shares = np.where(_largest(shares, top_k), shares, 0)
    if normalised:
        shares /= shares.sum(axis=1, keepdims=True)
    return shares if factor == 1 else shares * np.float32(factor)


def sigmoid_router(scores: FloatArray, top_k: int) -> FloatArray:
    """The sigmoid of the `top_k` largest scores (Llama 4)."""
    return np.where(_largest(scores, top_k), sigmoid(scores), 0)


def corrected_router(
    scores: FloatArray,
    correction: FloatArray,
    top_k: int,
    *,
    groups: Groups,
    normalised: bool = False,
    factor: float = 1.0,
) -> FloatArray:
    """The sigmoids of `top_k` scores, times `factor` (DeepSeek-V3, arXiv 2412.19437, eq. 13 to 16).

    correction: [n_experts], added to the sigmoids when the largest are chosen, and then only
    groups: the best have the largest sum of two experts
    normalised: the sum of the shares becomes 1 before `factor`
    """
    shares = sigmoid(scores)
    ranks = shares + correction
    ranks = np.where(_in_best_groups(ranks, groups, 2), ranks, np.float32(-np.inf))
    shares = np.where(_largest(ranks, top_k), shares, 0)
    if normalised:
        shares /= shares.sum(axis=1, keepdims=True) + np.float32(1e-20)  # all may be 0
    return shares * np.float32(factor)


def _largest(ranks: FloatArray, top_k: int) -> NDArray[np.bool_]:
    """Where the `top_k` largest of each row are."""
    count = ranks.shape[1]
    best = np.argpartition(ranks, count - top_k, axis=1)[:, count - top_k :]
    chosen = np.zeros(ranks.shape, dtype=np.bool_)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


def _in_best_groups(ranks: FloatArray, groups: Groups, counted: int) -> NDArray[np.bool_]:
    """Where the experts of each row's best groups are: those with the largest sum of their
    `counted` largest ranks."""
    by_group = ranks.reshape(len(ranks), groups.count, -1)
    size = by_group.shape[2]
    counted = min(counted, size)
    total = np.partition(by_group, size - counted, axis=2)[:, :, size - counted :].sum(axis=2)
    return np.repeat(_largest(total, groups.kept), size, axis=1)
