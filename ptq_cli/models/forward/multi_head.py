"""Multi-head attention: q, k and v in three linears or one, softmax, the output linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.attention import Cache, HeadBias, Packing, attend
from ptq_cli.models.forward.branch import Flow, Shapes, Step, last_step, sites_of
from ptq_cli.models.forward.layers import Linear, Norm, Weights
from ptq_cli.models.forward.rope import Rope, rotate, rotations


@dataclass(frozen=True)
class MultiHead:
    """Multi-head attention; with fewer key heads than heads, grouped.

    qkv: three linears, or one that is fused: q, then k, then v, or (`per_head`) for each key head
        its queries, its key and its value
    norms: of queries and keys, by "q" and "k"; of each head, or (`norm_whole`) of all as one
    rope: how positions turn queries and keys; None: not at all
    window: tokens that a token sees, itself included, or None for all
    chunk: tokens of the chunks a sequence is cut into, of which none sees another, or None
    scale, softcap: of the scores
    bias: what heads have beside their scores, or None: nothing
    vectors: tensors of a value a head that `bias` reads
    gated: the linear of queries gives, behind those of each head, as many gates of what it mixes
    """

    qkv: tuple[Linear, ...]
    output: Linear
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    norms: Mapping[str, Norm] = field(default_factory=dict)
    norm_whole: bool = False
    rope: Rope | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    bias: Callable[[Weights, Packing], HeadBias] | None = None
    vectors: tuple[str, ...] = ()
    gated: bool = False
    per_head: bool = False

    @property
    def module(self) -> str:
        """The module that caches keys and values."""
        return self.qkv[0].name.rpartition(".")[0]

    @property
    def first_sites(self) -> tuple[str, ...]:
        return (self.qkv[0].name,)

    @property
    def running(self) -> int:
        return self.head_dim * ((7 if self.gated else 4) * self.n_heads + 5 * self.n_kv_heads)

    @property
    def kept(self) -> int:
        return self.head_dim * self.n_heads

    def shapes(self, hidden_size: int) -> Shapes:
        query, shared = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        rows = [query * (2 if self.gated else 1), shared, shared]
        if len(self.qkv) == 1:
            rows = [sum(rows)]
        found = {li.name: (n, hidden_size) for li, n in zip(self.qkv, rows, strict=True)}
        found[self.output.name] = (hidden_size, query)
        heads = f"{self.n_heads} attention heads and {self.n_kv_heads} key heads"
        vectors = dict.fromkeys(self.vectors, self.n_heads)
        return Shapes(found, f"{heads} of {self.head_dim} channels", vectors)

    def steps(self, packing: Packing, cache: Cache | None) -> tuple[Step, ...]:
        site, output = self.qkv[0].name, self.output

        def attention(weights: Weights, flow: Flow) -> Flow:
            roles = "qkvg" if self.gated else "qkv"
            queries, keys, values, *gate = self.heads(weights, flow.inputs[site], packing, roles)
            if cache is not None:
                cache(keys, values)
            mixed = attend(
                queries,
                keys,
                values,
                packing if self.chunk is None else packing.chunked(self.chunk),
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
                bias=None if self.bias is None else self.bias(weights, packing),
            )
            if gate:
                mixed *= layers.sigmoid(gate[0]).reshape(mixed.shape)
            return Flow({output.name: mixed})

        return Step(sites_of(self.qkv), attention), last_step(output)

    def heads(
        self, weights: Weights, inputs: FloatArray, packing: Packing, roles: str = "qkv"
    ) -> list[FloatArray]:
        """The queries, keys and values that attention works on, normed and rotated, each float32
        [n_tokens, heads, head_dim]. roles: which of them, "g" for gates
        """
        parts = self._projected(weights, inputs, roles)
        named = {
            role: self._normed(role, weights, np.ascontiguousarray(part))
            for role, part in zip(roles, parts, strict=True)
        }
        if self.rope is not None:
            cosine, sine = rotations(self.rope, packing.positions, packing.mask.shape[1])
            for role in "qk":
                if role in named:
                    rotate(named[role], cosine, sine, self.rope.interleaved)
        return [named[role] for role in roles]

    def _projected(self, weights: Weights, inputs: FloatArray, roles: str) -> list[FloatArray]:
        """The outputs of the linears, or the parts of those of the one that is fused."""
        if len(self.qkv) > 1:
            linears = dict(zip("qkv", self.qkv, strict=True))
            parts = {
                role: layers.apply_linear(linear, weights, inputs)
                for role, linear in linears.items()
                if role in roles
            }
            if self.gated and "q" in parts:
                both = parts["q"].reshape(len(inputs), self.n_heads, 2, self.head_dim)
                parts["q"], parts["g"] = both[:, :, 0], both[:, :, 1]
            return [parts[role] for role in roles]
        outputs = layers.apply_linear(self.qkv[0], weights, inputs)
        parts = dict(zip("qkv", self._split(outputs), strict=True))
        return [parts[role] for role in roles]

    def _split(self, outputs: FloatArray) -> list[FloatArray]:
        """Queries, keys and values in the outputs of the linear that is fused."""
        if self.per_head:
            group = self.n_heads // self.n_kv_heads
            heads = outputs.reshape(len(outputs), self.n_kv_heads, group + 2, self.head_dim)
            return np.split(heads, [group, group + 1], axis=2)
        query, shared = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return np.split(outputs, [query, query + shared], axis=1)

    def _normed(self, role: str, weights: Weights, outputs: FloatArray) -> FloatArray:
        """The heads [n_tokens, heads, head_dim] in a linear's outputs, behind their norm."""
        heads: FloatArray = outputs.reshape(len(outputs), -1, self.head_dim)
        norm = self.norms.get(role)
        if norm is None:
            return heads
        normed = layers.apply_norm(norm, weights, outputs if self.norm_whole else heads)
        return normed.reshape(heads.shape)
