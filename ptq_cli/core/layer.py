"""Layers, units of work, and the plan: all that is known before the first weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.kv_cache import KVCache


@dataclass(frozen=True)
class Layer:
    """A tensor that is quantized, seen as a matrix.

    module: the tensor's name without `.weight`
    tensor: the tensor's name in the checkpoint
    shape: (out_features, in_features); a tensor of higher rank is [first, all others]
    full_shape: the shape in the checkpoint
    dtype: safetensors' word for the float dtype in the checkpoint
    model_dtype: that in which loaders hold the whole model; "" is the same
    reordered: whether the groups follow a g_idx of their own (act_order desc)
    method: what rounded it, once that is known
    activation: how the layer's inputs are rounded too, or None
    transposed: stored [in_features, out_features] in the checkpoint (GPT-2's Conv1D)
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    full_shape: tuple[int, ...]
    dtype: str
    grid: Grid
    reordered: bool = False
    method: str = ""
    activation: Activation | None = None
    transposed: bool = False
    model_dtype: str = ""

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def static_inputs(self) -> bool:
        """Whether its inputs are rounded with one scale, known beforehand."""
        return self.activation is not None and not self.activation.dynamic

    @property
    def calibrated_inputs(self) -> bool:
        """Whether a scale of its inputs is known beforehand: that, or a global one of groups."""
        return self.activation is not None and self.activation.calibrated

    def as_stored(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """A weight [out_features, in_features] in the shape of the checkpoint's tensor."""
        return (weight.T if self.transposed else weight).reshape(self.full_shape)


@dataclass(frozen=True)
class Misfit:
    """Why a format cannot hold a layer, and the option that would help, if one would."""

    reason: str
    hint: str | None = None


@dataclass(frozen=True)
class Unit:
    """The least work that can be lost and redone alone: the linears of one site.

    name: the site, or the module where a layer shares its input with none
    site: the site whose statistics serve, or None where there is no calibration
    memory: bytes that working on it needs, at most
    nearest: why its layers are rounded to nearest whatever the method, or None
    beside: layers of other units whose scales are under one global scale with some of these
    """

    name: str
    layers: tuple[Layer, ...]
    site: str | None
    memory: int
    nearest: str | None = None
    beside: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A tensor that is copied byte for byte, and why."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True)
class GgufTypes:
    """What of a GGUF file's types its layers do not tell.

    stored_as: types of dense tensors, where one was asked for, by their names in the checkpoint
    file_type: general.file_type, or None: that of most layers
    """

    stored_as: Mapping[str, str] = field(default_factory=dict)
    file_type: int | None = None


ALL_TOLD = GgufTypes()


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read.

    untried: warnings that say no more than that nobody tried: no error with --strict
    kv_cache: how the keys and values that attention caches are rounded too, or None
    types: of a GGUF file
    """

    method: str
    settings: Any
    format: str
    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    kv_cache: KVCache | None = None
    types: GgufTypes = ALL_TOLD

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for unit in self.units for layer in unit.layers)
