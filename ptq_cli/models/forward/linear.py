"""A linear whose weight stays packed small: codes, scales, zeros and a bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Activation
from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import stated_in
from ptq_cli.models.forward.layers import LinearTensor, Tensor
from ptq_cli.numerics.activations import ActivationSettings, rounded_inputs
from ptq_cli.numerics.integer_matmul import linear_dequantized, linear_w8a8


@dataclass(frozen=True)
class QuantizedLinear:
    """`outputs = inputs @ dequantized.T + bias`, dequantized a panel of rows at a time; or, with
    `activations`, `inputs` rounded to integers and multiplied with the codes as integers (W8A8).

    weight: codes [out_features, in_features]; bias: [out_features] or None
    activations: how inputs are rounded to integers; None, or the scheme "none": not at all
    small_floats: how they are rounded to small floats instead, or None
    """

    weight: QuantizedWeight
    bias: NDArray[np.float32] | None = None
    activations: ActivationSettings | None = None
    small_floats: Activation | None = None

    def __call__(self, inputs: Array) -> NDArray[np.float32]:
        """inputs: float [..., in_features] → float32 [..., out_features].

        Raises:
            InputError: inputs of another width.
        """
        if self.small_floats is not None:
            rows = inputs.reshape(-1, inputs.shape[-1])
            rows = rounded_inputs(rows, self.small_floats, self.weight.input_scale)
            inputs = rows.reshape(inputs.shape)
        if self.activations is None:
            return linear_dequantized(inputs, self.weight, self.bias)
        return linear_w8a8(inputs, self.weight, self.bias, self.activations)


def as_tensor(layer: Layer, weight: QuantizedWeight) -> Tensor:
    """What a forward takes for the layer's tensor: the dequantized weight in its stored shape, and
    with it how the inputs are rounded, where the layer says so; its errors name the layer."""
    values, activation = layer.as_stored(weight.dequantized()), layer.activation
    if activation is None:
        return values
    scale, zero = weight.input_scale, weight.input_zero

    def round_inputs(inputs: FloatArray) -> FloatArray:
        with stated_in(layer.module):
            return rounded_inputs(inputs, activation, scale, zero)

    return LinearTensor(values, round_inputs)
