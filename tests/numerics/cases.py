"""Weights and Hessians that the tests of the engine share."""

from __future__ import annotations

import numpy as np

DAMP = 0.01


def some_weight(rows, columns, seed=0):
    """Weights with a few outliers, float64 [rows, columns]."""
    rng = np.random.default_rng((seed, rows, columns))
    return rng.standard_t(4, (rows, columns)) * 0.02


def some_hessian(n, seed=0, dead=()):
    """`inputs.T @ inputs / n_tokens` of correlated channels of unlike size; `dead` ones are 0."""
    rng = np.random.default_rng((seed, n))
    mix = np.eye(n) + rng.normal(size=(n, n)) / np.sqrt(n)
    inputs = rng.normal(size=(2 * n + 8, n)) @ mix * np.exp(rng.normal(size=n))
    inputs[:, list(dead)] = 0
    return inputs.T @ inputs / len(inputs)


def damped(hessian, damp=DAMP):
    """`H + λI`, what the engine minimizes over."""
    return hessian + damp * hessian.diagonal().mean() * np.eye(len(hessian))
