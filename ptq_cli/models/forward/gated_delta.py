"""The gated delta rule as a branch (Qwen3-Next): it mixes tokens where other blocks have attention.

Yang et al., arXiv 2412.06464; the recurrence itself is in scans.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.attention import Cache, Packing
from ptq_cli.models.forward.branch import Flow, Shapes, Step, last_step, sites_of
from ptq_cli.models.forward.layers import Linear, Norm, Weights
from ptq_cli.models.forward.scans import causal_convolution, gated_delta_rule


@dataclass(frozen=True)
class GatedDelta:
    """Queries, keys and values behind a convolution, the recurrence, a norm behind a gate.

    inputs: two linears; key head by key head, the first gives its query, its key, and the values
        and gates of the heads it serves, the second the rates and the decays of these
    output: the linear behind the gate
    module: holds what is no linear: conv1d, A_log, dt_bias
    norm: of what each head reads
    activation: behind the convolution, a name in layers.ACTIVATIONS
    kernel_size: tokens that the convolution sees
    """

    inputs: tuple[Linear, Linear]
    output: Linear
    module: str
    n_key_heads: int
    n_heads: int
    key_dim: int
    value_dim: int
    norm: Norm
    activation: str
    kernel_size: int

    @property
    def first_sites(self) -> tuple[str, ...]:
        return (self.inputs[0].name,)

    @property
    def running(self) -> int:
        return 8 * self.n_key_heads * self.key_dim + 7 * self.kept

    @property
    def kept(self) -> int:
        return self.n_heads * self.value_dim

    def shapes(self, hidden_size: int) -> Shapes:
        keys = self.n_key_heads * self.key_dim
        first, second = self.inputs
        heads = f"{self.n_key_heads} key heads of {self.key_dim} channels"
        return Shapes(
            {
                first.name: (2 * keys + 2 * self.kept, hidden_size),
                second.name: (2 * self.n_heads, hidden_size),
                self.output.name: (hidden_size, self.kept),
            },
            f"{heads}, {self.n_heads} value heads of {self.value_dim}, a convolution of"
            f" {self.kernel_size} tokens",
            {f"{self.module}.{name}": self.n_heads for name in ("A_log", "dt_bias")},
            {f"{self.module}.conv1d.weight": (2 * keys + self.kept, self.kernel_size)},
        )

    def steps(self, packing: Packing, cache: Cache | None) -> tuple[Step, ...]:
        site, output = self.inputs[0].name, self.output

        def inwards(weights: Weights, flow: Flow) -> Flow:
            return Flow({output.name: self._mixed(weights, flow.inputs[site], packing)})

        return Step(sites_of(self.inputs), inwards), last_step(output)

    def _mixed(self, weights: Weights, inputs: FloatArray, packing: Packing) -> FloatArray:
        """From the inputs of the first linears to those of the output linear."""
        n, key, value = len(inputs), self.key_dim, self.kept // self.n_key_heads
        by_head = layers.apply_linear(self.inputs[0], weights, inputs)
        by_head = by_head.reshape(n, self.n_key_heads, -1)
        *qkv, gate = np.split(by_head, [key, 2 * key, 2 * key + value], axis=2)
        queries, keys, values = self._convolved(weights, qkv, packing)
        rate, decay = self._rate_and_decay(weights, inputs)
        read = gated_delta_rule(
            _unit(queries) * np.float32(key**-0.5), _unit(keys), values, decay, rate, packing
        )
        normed = layers.apply_norm(self.norm, weights, read)
        return layers.activate("silu", gate.reshape(n, -1), normed.reshape(n, -1))

    def _convolved(
        self, weights: Weights, qkv: list[FloatArray], packing: Packing
    ) -> list[FloatArray]:
        """Queries, keys and values, [n_tokens, heads, channels] each, behind the convolution."""
        n = packing.n_tokens
        mixed = np.concatenate([part.reshape(n, -1) for part in qkv], axis=1)
        kernel = layers.fetch(weights, f"{self.module}.conv1d.weight")[:, 0]
        mixed = causal_convolution(mixed, kernel, None, packing)
        mixed = layers.activate(self.activation, mixed, None)
        width = self.n_key_heads * self.key_dim
        dims = (self.key_dim, self.key_dim, self.value_dim)
        parts = np.split(mixed, [width, 2 * width], axis=1)
        return [part.reshape(n, -1, dim) for part, dim in zip(parts, dims, strict=True)]

    def _rate_and_decay(
        self, weights: Weights, inputs: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """How much each token writes to a head's state, and the logarithm of what it leaves of it,
        [n_tokens, n_heads] each."""
        outputs = layers.apply_linear(self.inputs[1], weights, inputs)
        by_head = outputs.reshape(len(inputs), self.n_key_heads, -1)
        rate, time = (x.reshape(len(inputs), -1) for x in np.split(by_head, 2, axis=2))
        time = layers.softplus(time + layers.fetch(weights, f"{self.module}.dt_bias"))
        fall = np.exp(layers.fetch(weights, f"{self.module}.A_log"))
        return layers.sigmoid(rate), -fall * time


def _unit(heads: FloatArray) -> FloatArray:
    """Heads [n_tokens, heads, channels] of length 1; very short ones stay shorter."""
    square = np.einsum("nhc,nhc->nh", heads, heads)
    outputs: FloatArray = heads / np.sqrt(square + np.float32(1e-6))[..., None]
    return outputs
