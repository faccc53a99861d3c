"""Routers against their formulas, one token at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptq_cli.models.forward.layers import sigmoid
from ptq_cli.models.forward.routers import (
    Groups,
    corrected_router,
    sigmoid_router,
    softmax_router,
)

SCORES = np.random.default_rng(3).standard_normal((40, 12)).astype(np.float32) * 3
CORRECTION = np.random.default_rng(4).standard_normal(12).astype(np.float32)


def best(values: Any, count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def softmax(values: Any) -> Any:
    share = np.exp(values - np.max(values))
    return share / share.sum()


def experts_of_best_groups(ranks: Any, count: int, kept: int, counted: int) -> list[int]:
    size = len(ranks) // count
    total = [sum(sorted(ranks[g * size : (g + 1) * size])[-counted:]) for g in range(count)]
    return [expert for g in best(total, kept) for expert in range(g * size, (g + 1) * size)]


def by_token(token: Any) -> Any:
    """The shares of all tokens from those of the chosen experts of one."""
    wanted = np.zeros(SCORES.shape)
    for row, scores in zip(wanted, SCORES.astype(float), strict=True):
        for expert, share in token(scores).items():
            row[expert] = share
    return wanted


def check(found: Any, token: Any) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_token(token), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 3, 12])
def test_the_largest_of_a_softmax(top_k: int) -> None:
    def token(scores: Any) -> Any:
        share = softmax(scores)
        return {e: share[e] for e in best(share, top_k)}

    check(softmax_router(SCORES, top_k), token)


@pytest.mark.parametrize("top_k", [1, 3, 12])
def test_the_softmax_of_the_largest(top_k: int) -> None:
    """As gpt-oss writes it."""

    def token(scores: Any) -> Any:
        chosen = best(scores, top_k)
        return dict(zip(chosen, softmax(scores[chosen]), strict=True))

    check(softmax_router(SCORES, top_k, normalised=True), token)


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (4, 2), (3, 2), (12, 5)])
def test_the_largest_of_a_softmax_in_the_best_groups(count: int, kept: int) -> None:
    def token(scores: Any) -> Any:
        share = softmax(scores)
        allowed = experts_of_best_groups(share, count, kept, 1)
        return {allowed[i]: 2.5 * share[allowed[i]] for i in best(share[allowed], 3)}

    check(softmax_router(SCORES, 3, groups=Groups(count, kept), factor=2.5), token)


@pytest.mark.parametrize("top_k", [1, 3, 12])
def test_sigmoids_of_the_largest(top_k: int) -> None:
    def token(scores: Any) -> Any:
        return {e: 1 / (1 + np.exp(-scores[e])) for e in best(scores, top_k)}

    check(sigmoid_router(SCORES, top_k), token)


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (4, 2), (3, 2), (12, 5)])
@pytest.mark.parametrize("normalised", [False, True])
def test_corrected_sigmoids_in_the_best_groups(count: int, kept: int, normalised: bool) -> None:
    def token(scores: Any) -> Any:
        share = 1 / (1 + np.exp(-scores))
        ranks = share + CORRECTION
        allowed = experts_of_best_groups(ranks, count, kept, 2)
        chosen = [allowed[i] for i in best(ranks[allowed], 3)]
        total = share[chosen].sum() if normalised else 1
        return {e: 2.5 * share[e] / total for e in chosen}

    groups = Groups(count, kept)
    found = corrected_router(
        SCORES, CORRECTION, 3, groups=groups, normalised=normalised, factor=2.5
    )
    check(found, token)


def test_a_correction_chooses_and_does_not_weigh() -> None:
    scores = np.zeros((1, 4), dtype=np.float32)
    correction = np.array([0, 9, -9, 1], dtype=np.float32)
    found = corrected_router(scores, correction, 2, groups=Groups(1, 1))
    np.testing.assert_allclose(found, [[0, 0.5, 0, 0.5]])


def test_scores_of_any_size_do_not_overflow() -> None:
    scores = np.array([[-2e3, -90, 0, 90, 2e3]], dtype=np.float32)
    np.testing.assert_allclose(sigmoid(scores), [[0, 0, 0.5, 1, 1]], atol=1e-30)
    assert np.isfinite(softmax_router(scores, 2, normalised=True)).all()
    # the largest are told apart where their sigmoids are all 1
    assert np.flatnonzero(sigmoid_router(scores, 1)).tolist() == [4]
