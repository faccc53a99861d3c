"""Activations as integers: `inputs ≈ scale · codes`, symmetric around zero.

`codes = clip(round(input / scale), ±q)` and `scale = range / q`, with q = 127 at 8 bits and 7 at 4;
the range is the absolute maximum or a percentile of the absolute values, of one row (token) or of
the whole tensor. A range of 0 gives scale 0 and codes 0. Scales are float32; the quotient is taken
in the dtype of the inputs, at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.levels import SMALL_FLOATS
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.numerics.scales import global_scale_of
from ptq_cli.numerics.small_floats import round_levels

SCHEMES = ("dynamic-token", "dynamic-tensor", "static", "none")
LARGEST_CODE = {8: 127, 4: 7}


@dataclass(frozen=True)
class ActivationSettings:
    """How inputs are rounded before an integer product.

    bits: 8 (±127) or 4 (±7).
    scheme: "dynamic-token" a scale for each row of inputs, "dynamic-tensor" one for all of them,
        "static" the scale `static_scale`, "none" inputs stay float.
    percentile: in (0, 1]; the range is the ceil(p · n)-th smallest absolute value; 1 is the
        absolute maximum. Values beyond the range are clipped.
    static_scale: the size of one step, in units of the inputs; 0 rounds everything to 0.

    Raises:
        InputError: a value out of range, or "static" without a scale.
    """

    bits: int = 8
    scheme: str = "dynamic-token"
    percentile: float = 1.0
    static_scale: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in LARGEST_CODE:
            raise InputError(f"activations of {self.bits} bits are not known; 8 and 4 are")
        if not 0 < self.percentile <= 1:
            raise InputError(f"percentile {self.percentile} is outside (0, 1]")
        if self.scheme not in SCHEMES:
            raise InputError(f"activation scheme {self.scheme!r} is none of {', '.join(SCHEMES)}")
        if self.scheme == "static":
            _check_static(self.static_scale)


@dataclass(frozen=True)
class QuantizedActivations:
    """Rounded inputs, `inputs ≈ codes · scales[:, None]`.

    codes: int8 [n, in_features], −q … q
    scales: float32 [n] (per row) or [1]; 0 where the range is 0, and the codes are 0 there
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def dequantized(self) -> NDArray[np.float32]:
        """float32 [n, in_features]."""
        result: NDArray[np.float32] = self.codes.astype(np.float32) * self.scales[:, None]
        return result


def activation_range(inputs: Array, percentile: float = 1.0, per_row: bool = False) -> FloatArray:
    """The ceil(p · n)-th smallest of n absolute values (`math.ceil(p * n)` in float64), 0 < p ≤ 1.

    inputs: float [n, in_features]; returns [n] with `per_row`, else [1]; 0 where there is no value.
    A percentile may be 0 where most inputs are: everything is then rounded to 0.

    Raises:
        NumericalError: inputs hold NaN or infinity.
    """
    magnitude = np.abs(_floats(inputs))
    magnitude = magnitude if per_row else magnitude.reshape(1, -1)
    if magnitude.shape[1] == 0:
        return np.zeros(magnitude.shape[0], magnitude.dtype)
    top: FloatArray = magnitude.max(axis=1)
    if not np.isfinite(top).all():
        raise NumericalError("activations hold NaN or infinity")
    rank = min(magnitude.shape[1], max(1, ceil(percentile * magnitude.shape[1])))
    if rank == magnitude.shape[1]:
        return top
    magnitude.partition(rank - 1, axis=1)
    return magnitude[:, rank - 1].copy()


def quantize_activations(inputs: Array, settings: ActivationSettings) -> QuantizedActivations:
    """Round inputs [n, in_features] as `settings` (any scheme but "none") say.

    Raises:
        NumericalError: inputs hold NaN or infinity, or a scale does not fit float32.
    """
    largest = LARGEST_CODE[settings.bits]
    per_row = settings.scheme == "dynamic-token"
    scales = activation_range(inputs, settings.percentile, per_row) / largest
    if settings.scheme == "static":
        scales = np.array([settings.static_scale])
    with np.errstate(over="ignore", under="ignore"):
        steps = scales.astype(np.float32)
    if not np.isfinite(steps).all():
        raise NumericalError(
            f"an activation scale of {float(scales.max()):.4g} does not fit float32"
        )
    with np.errstate(over="ignore"):
        quotient = _floats(inputs) / np.where(steps > 0, steps, np.float32(1))[:, None]
    np.rint(quotient, out=quotient)
    np.clip(quotient, -largest, largest, out=quotient)
    codes = quotient.astype(np.int8)
    codes[np.broadcast_to(steps == 0, codes.shape[:1])] = 0
    return QuantizedActivations(codes, steps)


def absmax_scale(absmax: Array, bits: int = 8) -> float:
    """The static scale that clips nothing of inputs whose channels reach absmax [in_features]."""
    return float(absmax.max(initial=0)) / LARGEST_CODE[bits]


def calibrated_scale(absmax: Array, activation: Activation) -> float:
    """What a layer's inputs, whose channels reach absmax [in_features], are rounded with: a static
    scale that clips nothing, or the global scale of groups' E4M3 scales (a float32)."""
    small = SMALL_FLOATS.get(activation.levels)
    if small is None:
        return absmax_scale(absmax, activation.bits)
    most = float(absmax.max(initial=0))
    if activation.scale_dtype == "e4m3":
        return global_scale_of(most, small)
    return most / small.largest or 1.0  # of inputs that are all zero any will do


def with_static_scale(settings: ActivationSettings, absmax: Array) -> ActivationSettings:
    """The settings with the scale of inputs whose channels reach absmax, where it is static."""
    if settings.scheme != "static":
        return settings
    return replace(settings, static_scale=absmax_scale(absmax, settings.bits))


def stated(activation: Activation, scale: float | None = None) -> ActivationSettings:
    """The settings that say what a layer's metadata says of its (symmetric) inputs.

    scale: of a static scheme

    Raises:
        InputError: inputs with a zero of their own, which these settings do not know.
    """
    if not activation.sym:
        raise InputError("asymmetric inputs have no integer product here")
    if not activation.dynamic:
        return ActivationSettings(activation.bits, "static", static_scale=scale)
    scheme = "dynamic-token" if activation.per_token else "dynamic-tensor"
    return ActivationSettings(activation.bits, scheme)


def rounded_inputs(
    inputs: Array, activation: Activation, scale: float | None = None, zero: int | None = None
) -> NDArray[np.float32]:
    """What a layer's rounded inputs stand for: float [n, in_features] → float32, the same shape.

    scale, zero: of a static scheme, `input ≈ scale · (code − zero)`, codes 0 … 2^bits − 1, or
    `scale · level`; or the global scale that groups' E4M3 scales are divided by. Dynamic asymmetric
    inputs find theirs as weights do: the range is widened to hold 0.

    Raises:
        InputError: a static scheme without a scale.
        NumericalError: inputs hold NaN or infinity.
    """
    if activation.levels != "integer":
        return _small_floats(inputs, activation, scale)
    if activation.sym:
        return quantize_activations(inputs, stated(activation, scale)).dequantized()
    activation_range(inputs)  # refuses NaN and infinity
    largest = (1 << activation.bits) - 1
    values = inputs.astype(np.float32, copy=False)
    if activation.dynamic:
        axis = 1 if activation.per_token else None
        low = np.minimum(values.min(axis, initial=0, keepdims=True), 0)
        high = np.maximum(values.max(axis, initial=0, keepdims=True), 0)
        steps = (high - low) / np.float32(largest)
        steps[steps == 0] = 1
        middle = np.clip(np.rint(-low / steps), 0, largest)
    else:
        _check_static(scale)
        steps, middle = np.array([[scale or 1]], np.float32), np.array([[zero or 0]], np.float32)
    codes = np.clip(np.rint(values / steps) + middle, 0, largest)
    result: NDArray[np.float32] = (codes - middle) * steps
    return result


def _small_floats(
    inputs: Array, activation: Activation, scale: float | None
) -> NDArray[np.float32]:
    """Inputs as small floats: dynamic ones are rounded as the rows of a weight are."""
    values = inputs.astype(np.float32, copy=False)
    activation_range(values)  # refuses NaN and infinity
    if activation.calibrated:
        _check_static(scale)
    grid = Grid(
        activation.bits,
        activation.group_size or (-1 if activation.per_token else 0),
        scale_dtype=activation.scale_dtype,
        levels=activation.levels,
        global_scale=scale if activation.dynamic and activation.calibrated and scale else 1.0,
    )
    if activation.dynamic:
        return round_to_nearest(values, grid).dequantized()
    step = np.float32(scale or 1)
    return (round_levels(values / step, grid) * step).astype(np.float32, copy=False)


def _floats(inputs: Array) -> FloatArray:
    """The inputs as float32, or as float64 where they are."""
    return inputs if inputs.dtype == np.float64 else inputs.astype(np.float32, copy=False)


def _check_static(scale: float | None) -> None:
    if scale is None or not 0 <= scale < float("inf"):
        raise InputError(f"static activation scale {scale} is not a finite number of at least 0")
