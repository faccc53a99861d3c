"""What stands beside any weight of compressed-tensors: the shape of scales, and the static scale
of the inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ptq_cli.core.layer import Layer
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common, small_floats
from ptq_cli.numerics.scales import LEAST_SCALES, SCALE_DTYPES, ScaleMisfit


def scales_shape(layer: Layer) -> tuple[int, ...]:
    """Of the weight's scales: that of the whole tensor is [1]."""
    return (1,) if layer.grid.group_size == 0 else layer.grid.scales_shape(layer.shape)


def has_global(layer: Layer) -> bool:
    """Whether scales of the inputs' groups stand under a global scale."""
    return layer.activation is not None and layer.activation.scale_dtype == "e4m3"


def input_specs(layer: Layer) -> list[TensorSpec]:
    """The tensors that say how inputs are rounded."""
    if has_global(layer):
        return [TensorSpec(f"{layer.module}.input_global_scale", "F32", (1,))]
    if layer.activation is None or not layer.static_inputs:
        return []
    scale = common.SCALE_WORDS[layer.grid.scale_dtype]
    found = [TensorSpec(f"{layer.module}.input_scale", scale, (1,))]
    if not layer.activation.sym:
        found.append(TensorSpec(f"{layer.module}.input_zero_point", "I8", (1,)))
    return found


def encode_inputs(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    """The static scale of the inputs, where they have one (and not its zero).

    Raises:
        InputError: there is none.
        ScaleMisfit: it does not fit the dtype of the weight's scales.
    """
    activation = layer.activation
    if activation is None or not activation.calibrated:
        return {}
    if rounded.input_scale is None or (
        layer.static_inputs and rounded.input_zero is None and not activation.sym
    ):
        raise InputError(
            f"{layer.module}: static inputs want a scale from calibration, and there is none",
            hint="ptq calibrate, or dynamic inputs",
        )
    if has_global(layer):
        name = f"{layer.module}.input_global_scale"
        return {"input_global_scale": small_floats.one_number(name, rounded.input_scale)}
    dtype, least = SCALE_DTYPES[layer.grid.scale_dtype], LEAST_SCALES[layer.grid.scale_dtype]
    with np.errstate(over="ignore"):
        scale = np.array([rounded.input_scale]).astype(dtype)
    if not least <= scale[0].astype(np.float64) < np.inf:
        raise ScaleMisfit(
            f"the scale of its inputs, {rounded.input_scale:.2g}, does not fit"
            f" {layer.grid.scale_dtype}",
            hint="--activation-scheme dynamic-token",
        )
    return {"input_scale": scale}


def input_scale(layer: Layer, own: Mapping[str, Array]) -> float | None:
    """What `encode_inputs` stored. Raises InputError where it is not finite, or not above 0."""
    name = "input_global_scale" if has_global(layer) else "input_scale"
    stored = own.get(name)
    return None if stored is None else small_floats.positive(f"{layer.module}.{name}", stored)
