"""The small pieces of a block: linears, norms and activation functions on flattened tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ptq_cli.core.tensors import Array, FloatArray


@dataclass(frozen=True)
class LinearTensor:
    """A linear's weight in a model that rounds the linear's inputs when it runs (W8A8).

    values: the weight, in the checkpoint's shape
    round_inputs: float [n, in_features] → float32, what the integers stand for
    """

    values: Array
    round_inputs: Callable[[FloatArray], FloatArray]


Tensor = Array | LinearTensor
Weights = Callable[[str], Tensor] | Mapping[str, Tensor]
"""A tensor by its name in the checkpoint, in any float dtype; float32 is used without a copy."""

CHUNK = 1 << 17  # values that one pass of an activation function touches, so that they stay in L2


@dataclass(frozen=True)
class Linear:
    """A linear of a block: `inputs · weightᵀ (+ bias)`.

    name: the module; its tensors are `<name>.weight` and `<name>.bias`
    transposed: the checkpoint holds [in_features, out_features] (GPT-2)
    """

    name: str
    bias: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where `centred`; `offset` is added to the weight (1 in Gemma).

    affine: whether it has a weight; bias: and a bias.
    """

    name: str
    eps: float
    centred: bool = False
    offset: float = 0.0
    affine: bool = True
    bias: bool = False


def given(weights: Weights, name: str) -> Tensor:
    """The tensor `name`, which may be read anew each time."""
    return weights(name) if callable(weights) else weights[name]


def stored(weights: Weights, name: str) -> Array:
    """The tensor `name` as it is given."""
    tensor = given(weights, name)
    return tensor.values if isinstance(tensor, LinearTensor) else tensor


def fetch(weights: Weights, name: str) -> FloatArray:
    """The tensor `name` as float32."""
    return np.asarray(stored(weights, name), dtype=np.float32)


def round_inputs(weights: Weights, name: str, inputs: FloatArray) -> FloatArray:
    """The inputs of a linear as it multiplies them with its weight, the tensor `name`."""
    tensor = given(weights, name)
    return tensor.round_inputs(inputs) if isinstance(tensor, LinearTensor) else inputs


def apply_linear(linear: Linear, weights: Weights, inputs: FloatArray) -> FloatArray:
    """`inputs` [n_tokens, in_features] through `linear`: float32 [n_tokens, out_features]."""
    tensor = given(weights, f"{linear.name}.weight")
    if isinstance(tensor, LinearTensor):
        inputs, tensor = tensor.round_inputs(inputs), tensor.values
    weight = np.asarray(tensor, dtype=np.float32)
    outputs: FloatArray = inputs @ (weight if linear.transposed else weight.T)
    if linear.bias:
        outputs += fetch(weights, f"{linear.name}.bias")
    return outputs


def apply_norm(norm: Norm | None, weights: Weights, inputs: FloatArray) -> FloatArray:
    """`inputs` [n, width], or of n heads [n, heads, width], normalised over its last axis, float32;
    the same array without a norm. Gains are of [width], or of each head."""
    if norm is None:
        return inputs
    flat, scale = centred_and_scale(norm, inputs.reshape(-1, inputs.shape[-1]))
    flat = np.multiply(flat, scale[:, None], out=flat if norm.centred else None)
    outputs = flat.reshape(inputs.shape)
    if norm.affine:
        outputs *= fetch(weights, f"{norm.name}.weight") + np.float32(norm.offset)
    if norm.affine and norm.bias:
        outputs += fetch(weights, f"{norm.name}.bias")
    return outputs


def centred_and_scale(norm: Norm, inputs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """`inputs` [n, width], less their mean where the norm is centred (else the same array), and one
    over their root mean square, [n]."""
    outputs: FloatArray = inputs
    if norm.centred:
        outputs = inputs - inputs.mean(axis=1, keepdims=True)
    square = np.einsum("ij,ij->i", outputs, outputs)
    scale: FloatArray = 1 / np.sqrt(square / np.float32(inputs.shape[1]) + np.float32(norm.eps))
    return outputs, scale


def cap(scores: FloatArray, limit: float | None) -> None:
    """`limit · tanh(scores / limit)` in place; None: no limit."""
    if limit is not None:
        scores /= np.float32(limit)
        np.tanh(scores, out=scores)
        scores *= np.float32(limit)


def sigmoid(values: FloatArray) -> FloatArray:
    """`1 / (1 + exp(−values))`, float32, without an overflow."""
    small = np.exp(-np.abs(values))  # of 0 … 1
    outputs: FloatArray = np.where(values < 0, small, 1) / (1 + small)
    return outputs


def softplus(values: FloatArray) -> FloatArray:
    """`log(1 + exp(values))`, float32, without an overflow."""
    outputs: FloatArray = np.logaddexp(values, np.float32(0))
    return outputs


def activate(kind: str, inputs: FloatArray, factor: FloatArray | None) -> FloatArray:
    """`f(inputs) · factor` (factor 1 where None), float32 [n, width]; may overwrite `inputs`.

    In chunks of rows, so that the passes of f run in cache.
    """
    function = ACTIVATIONS[kind]
    outputs = inputs if inputs.flags.c_contiguous else np.empty(inputs.shape, dtype=np.float32)
    step = max(1, CHUNK // max(1, inputs.shape[1]))
    for start in range(0, len(inputs), step):
        rows = slice(start, start + step)
        function(inputs[rows], outputs[rows])
        if factor is not None:
            outputs[rows] *= factor[rows]
    return outputs


@dataclass(frozen=True)
class Clamp:
    """Of gpt-oss's gated activation. alpha: of the sigmoid; limit: of the gate and of up"""

    alpha: float
    limit: float


def clamped_swiglu(gate: FloatArray, up: FloatArray, clamp: Clamp) -> FloatArray:
    """`g · sigmoid(alpha · g) · (u + 1)`, float32 [n, width], where g is `gate` up to `limit` and u
    is `up` between −limit and limit; may overwrite both.

    In chunks of rows, so that its passes run in cache.
    """
    alpha, limit = np.float32(clamp.alpha), np.float32(clamp.limit)
    step = max(1, CHUNK // max(1, gate.shape[1]))
    for start in range(0, len(gate), step):
        g, u = gate[start : start + step], up[start : start + step]
        np.minimum(g, limit, out=g)
        np.clip(u, -limit, limit, out=u)
        u += 1
        u *= g
        g *= alpha
        u *= sigmoid(g)
    return up


def _silu(x: FloatArray, out: FloatArray) -> None:
    with np.errstate(over="ignore"):  # exp(−x) = inf is right: x / inf = 0
        below = np.exp(-x)
    below += 1
    np.divide(x, below, out=out)


def _gelu_tanh(x: FloatArray, out: FloatArray) -> None:
    inner = x * x
    inner *= np.float32(0.044715)
    inner += 1
    inner *= x
    inner *= np.float32(np.sqrt(2 / np.pi))
    np.tanh(inner, out=inner)
    inner += 1
    inner *= np.float32(0.5)
    np.multiply(inner, x, out=out)


def _gelu(x: FloatArray, out: FloatArray) -> None:
    inner = erf(x * np.float32(np.sqrt(0.5)))
    inner += 1
    inner *= np.float32(0.5)
    np.multiply(inner, x, out=out)


def _relu(x: FloatArray, out: FloatArray) -> None:
    np.maximum(x, 0, out=out)


def erf(x: FloatArray) -> FloatArray:
    """The error function in float32, within 3e-7 (Abramowitz and Stegun 7.1.26)."""
    size = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * size)
    total = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        total *= t
        total += np.float32(coefficient)
    total *= t
    total *= np.exp(-(size * size))
    return np.copysign(1 - total, x)


ACTIVATIONS: dict[str, Callable[[FloatArray, FloatArray], None]] = {
    "silu": _silu,
    "swish": _silu,
    **dict.fromkeys(("gelu", "gelu_python"), _gelu),
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
        _gelu_tanh,
    ),
    "relu": _relu,
}
