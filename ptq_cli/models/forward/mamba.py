"""Mamba-2 as a branch (Bamba): it mixes tokens where other blocks have attention.

Dao and Gu, arXiv 2405.21060; the recurrence itself is in scans.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.attention import Cache, Packing
from ptq_cli.models.forward.branch import Flow, Shapes, Step, last_step, sites_of
from ptq_cli.models.forward.layers import Linear, Norm, Weights
from ptq_cli.models.forward.scans import causal_convolution, mamba2_scan


@dataclass(frozen=True)
class Mamba:
    """A convolution, the recurrence, a norm behind a gate.

    input: gives gates, inputs, then b and c of each group, and a time step of each head
    output: the linear behind the norm
    module: holds what is no linear: conv1d, A_log, D, dt_bias, norm
    n_groups: of heads that share b and c, and of channels that are normed together
    state_size: channels of b and c
    time_limits: of the time steps
    convolution_bias: whether the convolution has biases
    norm: of a group of channels, its gains aside, which are of all channels
    activation: behind the convolution, a name in layers.ACTIVATIONS
    kernel_size: tokens that the convolution sees
    """

    input: Linear
    output: Linear
    module: str
    n_heads: int
    head_dim: int
    n_groups: int
    state_size: int
    time_limits: tuple[float, float]
    convolution_bias: bool
    norm: Norm
    activation: str
    kernel_size: int

    @property
    def first_sites(self) -> tuple[str, ...]:
        return (self.input.name,)

    @property
    def running(self) -> int:
        return 6 * self.kept + 6 * self.n_groups * self.state_size

    @property
    def kept(self) -> int:
        return self.n_heads * self.head_dim

    def shapes(self, hidden_size: int) -> Shapes:
        width, groups = self.kept, self.n_groups * self.state_size
        heads = f"{self.n_heads} Mamba heads of {self.head_dim} channels in {self.n_groups} groups"
        vectors = {f"{self.module}.{name}": self.n_heads for name in ("A_log", "D", "dt_bias")}
        if self.convolution_bias:
            vectors[f"{self.module}.conv1d.bias"] = width + 2 * groups
        return Shapes(
            {
                self.input.name: (2 * width + 2 * groups + self.n_heads, hidden_size),
                self.output.name: (hidden_size, width),
            },
            f"{heads}, a state of {self.state_size}, a convolution of {self.kernel_size} tokens",
            vectors,
            {f"{self.module}.conv1d.weight": (width + 2 * groups, self.kernel_size)},
        )

    def steps(self, packing: Packing, cache: Cache | None) -> tuple[Step, ...]:
        def inwards(weights: Weights, flow: Flow) -> Flow:
            mixed = self._mixed(weights, flow.inputs[self.input.name], packing)
            return Flow({self.output.name: mixed})

        return Step(sites_of((self.input,)), inwards), last_step(self.output)

    def _mixed(self, weights: Weights, inputs: FloatArray, packing: Packing) -> FloatArray:
        """From the inputs of the first linear to those of the output linear."""

        def own(name: str) -> FloatArray:
            return layers.fetch(weights, f"{self.module}.{name}")

        n, width, groups = len(inputs), self.kept, self.n_groups * self.state_size
        outputs = layers.apply_linear(self.input, weights, inputs)
        gate, mixed, time = np.split(outputs, [width, 2 * width + 2 * groups], axis=1)
        bias = own("conv1d.bias") if self.convolution_bias else None
        mixed = causal_convolution(mixed, own("conv1d.weight")[:, 0], bias, packing)
        mixed = layers.activate(self.activation, mixed, None)
        x, b, c = np.split(mixed, [width, width + groups], axis=1)
        read = mamba2_scan(
            x.reshape(n, self.n_heads, -1),
            np.clip(layers.softplus(time + own("dt_bias")), *self.time_limits),
            -np.exp(own("A_log")),
            b.reshape(n, self.n_groups, -1),
            c.reshape(n, self.n_groups, -1),
            own("D"),
            packing,
        )
        read = layers.activate("silu", gate, read.reshape(n, width))
        normed = layers.apply_norm(self.norm, weights, read.reshape(n, self.n_groups, -1))
        return normed.reshape(n, width) * own("norm.weight")
