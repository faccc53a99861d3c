"""The MLP of a block, gated or not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.attention import Cache, Packing
from ptq_cli.models.forward.branch import Flow, Shapes, Step, last_step, sites_of
from ptq_cli.models.forward.layers import Linear, Weights


@dataclass(frozen=True)
class MLP:
    """`output(f(gate) · up)`, or where not `gated` `output(f(up))`.

    inputs: (gate, up), (both fused,) or (up,)
    width: in_features of `output`
    activation: f, a name in layers.ACTIVATIONS
    clamp: f and the product are those of `layers.clamped_swiglu` instead
    """

    inputs: tuple[Linear, ...]
    output: Linear
    width: int
    activation: str
    gated: bool = True
    clamp: layers.Clamp | None = None

    @property
    def site(self) -> str:
        return self.inputs[0].name

    @property
    def first_sites(self) -> tuple[str, ...]:
        return (self.site,)

    @property
    def running(self) -> int:
        return 4 * self.width

    @property
    def kept(self) -> int:
        return self.width

    def shapes(self, hidden_size: int) -> Shapes:
        rows = 2 * self.width if self.gated and len(self.inputs) == 1 else self.width
        found = {linear.name: (rows, hidden_size) for linear in self.inputs}
        return Shapes(
            {**found, self.output.name: (hidden_size, self.width)},
            f"an intermediate size of {self.width}",
        )

    def steps(self, packing: Packing, cache: Cache | None) -> tuple[Step, ...]:
        def inwards(weights: Weights, flow: Flow) -> Flow:
            return Flow({self.output.name: self.inner(weights, flow.inputs[self.site])})

        return Step(sites_of(self.inputs), inwards), last_step(self.output)

    def inner(self, weights: Weights, inputs: FloatArray) -> FloatArray:
        """From the inputs of gate and up to those of the output linear, [n, width]."""
        if not len(inputs):  # of an expert, whose weights then need not be read
            return np.zeros((0, self.width), dtype=np.float32)
        parts = [layers.apply_linear(linear, weights, inputs) for linear in self.inputs]
        if self.gated and len(parts) == 1:
            parts = np.split(parts[0], 2, axis=1)
        if self.clamp is not None:
            return layers.clamped_swiglu(parts[0], parts[1], self.clamp)
        return layers.activate(self.activation, parts[0], parts[1] if self.gated else None)

    def outer(self, weights: Weights, inner: FloatArray) -> FloatArray:
        """From there to the outputs."""
        return layers.apply_linear(self.output, weights, inner)
