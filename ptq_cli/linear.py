"""A linear whose weight stays packed small: codes, scales, zeros and a bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_cli.errors import InputError
from ptq_cli.values import Array, QuantizedWeight

_ROWS = 1024


@dataclass(frozen=True)
class QuantizedLinear:
    """`outputs = inputs @ dequantized.T + bias`, dequantized a panel of rows at a time.

    weight: codes [out_features, in_features]; bias: [out_features] or None
    """

    weight: QuantizedWeight
    bias: NDArray[np.float32] | None = None

    def __call__(self, inputs: Array) -> NDArray[np.float32]:
        """inputs: float [..., in_features] → float32 [..., out_features].

        Raises:
            InputError: inputs of another width.
        """
        out_features, in_features = self.weight.codes.shape
        if inputs.shape[-1] != in_features:
            raise InputError(f"inputs {list(inputs.shape)} do not have {in_features} features")
        flat = inputs.reshape(-1, in_features).astype(np.float32)
        outputs = np.empty((len(flat), out_features), np.float32)
        for top in range(0, out_features, _ROWS):
            rows = slice(top, min(top + _ROWS, out_features))
            outputs[:, rows] = flat @ self.weight.dequantized(rows).T
        if self.bias is not None:
            outputs += self.bias
        return outputs.reshape(*inputs.shape[:-1], out_features)
