"""Norms and activation functions against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ptq_cli.models.forward import layers

RANDOM = np.random.default_rng(7)


def random_array(*shape: int, scale: float = 1.0) -> Any:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def test_activation_functions_equal_their_formulas() -> None:
    x = np.concatenate((np.linspace(-9, 9, 401), [-200, 200])).astype(np.float32)[None]
    wanted = {
        "silu": [v / (1 + math.exp(-v)) for v in x[0].astype(float)],
        "gelu": [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x[0].astype(float)],
        "relu": [max(v, 0.0) for v in x[0].astype(float)],
        "gelu_new": [
            0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
            for v in x[0].astype(float)
        ],
    }
    for kind, values in wanted.items():
        np.testing.assert_allclose(
            layers.activate(kind, x.copy(), None)[0], values, atol=2e-6, rtol=1e-6
        )


def test_layer_norm_equals_its_formula() -> None:
    x = random_array(5, 16) + 3
    weights = {"n.weight": random_array(16), "n.bias": random_array(16)}
    wanted = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    found = layers.apply_norm(layers.Norm("n", 1e-5, centred=True, bias=True), weights, x)
    np.testing.assert_allclose(found, wanted * weights["n.weight"] + weights["n.bias"], atol=1e-5)
