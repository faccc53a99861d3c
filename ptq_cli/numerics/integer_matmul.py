"""Exact products of integer activations and weight codes: `s_x · s_w · Σ_k x_k · (c_k − z)`.

Activations x (numerics/activations.py) are multiplied with weight codes as an integer machine does
it: int8 times int8, summed in int32. Weight codes enter as `c' = codes − 2^(bits−1)`, which int8
holds; a zero point elsewhere is put right by the usual correction,
`Σ x_k (c_k − z) = Σ x_k c'_k − z' Σ x_k`.

Why float32 BLAS gives the exact integers: int8 values are exact in float32 and a product of two is
an integer. As long as `chunk · max|x| · max|c'| ≤ 2²⁴`, every partial sum of a chunk, in whatever
order and with or without fused multiply-add, is an integer of at most 24 bits, and float32 holds
each of those: no step rounds. So K is cut into chunks of `2²⁴ // (max|x| · max|c'|)` columns (1032
for ±127 times −128 … 127, 16512 for W4A8, never less than 1024) and the chunks are added in int32.
(This needs a BLAS that adds products of the operands themselves, as OpenBLAS, MKL, BLIS and
Accelerate do at float32; a tensor-core TF32 product would not do.)

int32 cannot overflow while `Σ_k |x_k| · max|c'| < 2³¹`, in any order of summation; that holds for
every in_features below 65,536 and is checked on the data beyond: an overflow is an error.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.numerics.activations import ActivationSettings, quantize_activations
from ptq_cli.numerics.parallel import strips

_EXACT = 1 << 24  # float32 holds every integer up to here
_INT32_MAX = (1 << 31) - 1
_PANEL_ROWS = 2048  # rows of inputs worked on at a time


def integer_product(left: NDArray[np.int8], right: NDArray[np.int8]) -> NDArray[np.int32]:
    """`left @ right.T` exactly, summed as int32: int8 [n, k] and int8 [m, k] → int32 [n, m].

    Raises:
        NumericalError: a sum might not fit int32, in some order of summation.
    """
    largest_left, largest_right = _largest(left), _largest(right)
    _check_int32(left, largest_right)
    total = np.zeros((left.shape[0], right.shape[0]), np.int32)
    if total.size == 0:
        return total
    chunk = _EXACT // max(1, largest_left * largest_right)
    part = np.empty(total.shape, np.float32)
    for columns in strips(left.shape[1], chunk):
        np.matmul(left[:, columns].astype(np.float32), right[:, columns].T.astype(np.float32), part)
        np.add(total, part, out=total, casting="unsafe")
    return total


def linear_w8a8(
    inputs: Array,
    weight: QuantizedWeight,
    bias: Array | None = None,
    activations: ActivationSettings | None = None,
) -> NDArray[np.float32]:
    """`inputs @ weight.T + bias` on integers (W8A8, W4A8 and every other width of codes).

    inputs: float [..., in_features], rounded as `activations` say (default: 8 bits, per token);
        with scheme "none" this is `linear_dequantized`
    weight: any grid: per tensor, channel or group, symmetric or not, groups reordered or not
    bias: float [out_features], added in float32
    Returns float32 [..., out_features]: `s_x · Σ_g s_g · Σ_{k∈g} x_k (c_k − z_g) + bias`; the inner
    sums are exact int32, the rest is float32.

    Raises:
        InputError: inputs or bias of the wrong width; codes that are no integers.
        NumericalError: inputs hold NaN or infinity, or a sum might not fit int32.
    """
    settings = ActivationSettings() if activations is None else activations
    if settings.scheme == "none":
        return linear_dequantized(inputs, weight, bias)
    if not weight.grid.integers:
        raise InputError(f"its codes are small floats ({weight.grid.levels}), not integers")
    rows = _as_rows(inputs, weight, bias)
    rounded = quantize_activations(rows, settings)
    outputs = np.zeros((rows.shape[0], weight.codes.shape[0]), np.float32)
    for panel in strips(len(outputs), _PANEL_ROWS):
        for group, columns in _groups(weight):
            sums, scales = _group_product(rounded.codes[panel], weight, group, columns)
            part = sums.astype(np.float32)
            part *= scales
            outputs[panel] += part
    outputs *= rounded.scales[:, None]
    return _with_bias(outputs, bias, inputs.shape)


def linear_dequantized(
    inputs: Array, weight: QuantizedWeight, bias: Array | None = None
) -> NDArray[np.float32]:
    """`inputs @ dequantized.T + bias` in float32: float [..., in] → float32 [..., out_features].

    Raises:
        InputError: inputs or bias of the wrong width.
    """
    rows = _as_rows(inputs, weight, bias).astype(np.float32, copy=False)
    outputs = np.empty((rows.shape[0], weight.codes.shape[0]), np.float32)
    for panel in strips(outputs.shape[1], _PANEL_ROWS):
        outputs[:, panel] = rows @ weight.dequantized(panel).T
    return _with_bias(outputs, bias, inputs.shape)


def _group_product(
    codes: NDArray[np.int8], weight: QuantizedWeight, group: int, columns: Any
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    middle = weight.grid.mid_code
    part = codes[:, columns]
    _check_int32(part, 2 * middle)  # |c'| and |z'| together
    centred = (weight.codes[:, columns].astype(np.int16) - middle).astype(np.int8)
    sums = integer_product(part, centred)
    zeros = weight.zeros[:, group].astype(np.int32) - middle
    if zeros.any():
        sums -= part.sum(axis=1, dtype=np.int32)[:, None] * zeros
    return sums, weight.scales[:, group].astype(np.float32)


def _groups(weight: QuantizedWeight) -> list[tuple[int, Any]]:
    """(group, its columns): slices, or index arrays where the groups were reordered."""
    in_features = weight.codes.shape[1]
    if weight.g_idx is None:
        starts = weight.grid.starts(in_features)
        return [(g, slice(a, b)) for g, (a, b) in enumerate(pairwise(starts))]
    order = np.argsort(weight.g_idx, kind="stable")
    cuts = np.searchsorted(weight.g_idx[order], np.arange(weight.scales.shape[1] + 1))
    return [(g, order[cuts[g] : cuts[g + 1]]) for g in range(len(cuts) - 1)]


def _as_rows(inputs: Array, weight: QuantizedWeight, bias: Array | None) -> Array:
    out_features, in_features = weight.codes.shape
    if inputs.ndim == 0 or inputs.shape[-1] != in_features:
        raise InputError(f"inputs of shape {inputs.shape} do not fit in_features {in_features}")
    if bias is not None and bias.shape != (out_features,):
        raise InputError(f"a bias of shape {bias.shape} does not fit out_features {out_features}")
    return inputs.reshape(int(np.prod(inputs.shape[:-1])), in_features)


def _with_bias(
    outputs: NDArray[np.float32], bias: Array | None, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Outputs + bias, with the leading dimensions of the inputs' shape."""
    if bias is not None:
        outputs += bias.astype(np.float32)
    return outputs.reshape(*shape[:-1], outputs.shape[1])


def _largest(codes: NDArray[np.int8]) -> int:
    return max(-int(codes.min()), int(codes.max())) if codes.size else 0


def _check_int32(left: NDArray[np.int8], largest_right: int) -> None:
    n_columns = left.shape[1]
    if n_columns * 128 * largest_right <= _INT32_MAX:
        return
    sums = np.abs(left.astype(np.int16)).sum(axis=1, dtype=np.int64)
    if int(sums.max(initial=0)) * largest_right > _INT32_MAX:
        raise NumericalError(
            f"a sum over {n_columns} columns may overflow int32", hint="use a smaller --group-size"
        )
