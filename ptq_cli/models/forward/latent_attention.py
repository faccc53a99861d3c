"""Multi-head latent attention: keys and values of all heads come from one narrow vector of a token
(DeepSeek-V2, arXiv 2405.04434, section 2.1), and so may the queries from another.

A head's query and key have channels that positions turn behind those that they do not; the turned
channels of the key are one for all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.attention import Cache, Packing, attend
from ptq_cli.models.forward.branch import Flow, Shapes, Step, last_step, sites_of
from ptq_cli.models.forward.layers import Linear, Norm, Weights
from ptq_cli.models.forward.rope import Rope, rotate, rotations

_TURNED = "turned_key"  # the channels of keys that turn, [n_tokens, turned]
_NARROW, _NARROW_QUERIES = "narrow", "narrow_queries"  # before their norms
_QUERIES = "queries"  # of the linear that sees the branch's inputs, where it gives them


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention.

    first: the linears of the branch's inputs: (query_down, key_value_down), or where queries are
        not narrowed (queries, key_value_down)
    query_up: from the narrow vector to the queries of all heads, or None; query_norm: before it
    key_value_up: to the keys' channels that do not turn, and the values, head by head; norm: before
        it
    n_heads, still, turned, value_size: heads, channels of a query that do not and do turn, and of a
        value
    rank: of the narrow vector of keys and values; query_rank: of that of queries
    scale: of the scores
    """

    first: tuple[Linear, Linear]
    query_up: Linear | None
    query_norm: Norm | None
    key_value_up: Linear
    norm: Norm
    output: Linear
    n_heads: int
    still: int
    turned: int
    value_size: int
    rank: int
    query_rank: int
    scale: float
    rope: Rope

    @property
    def first_sites(self) -> tuple[str, ...]:
        return (self.first[0].name,)

    @property
    def running(self) -> int:
        query = self.still + self.turned
        return self.n_heads * (5 * query + 4 * self.value_size) + self.kept

    @property
    def kept(self) -> int:
        queries = self.n_heads * (self.still + self.turned)
        narrow = 2 * self.rank + self.turned + (2 * self.query_rank if self.query_up else queries)
        return max(narrow, self.n_heads * self.value_size)

    def shapes(self, hidden_size: int) -> Shapes:
        queries = self.n_heads * (self.still + self.turned)
        first, second = self.first
        found = {
            first.name: (self.query_rank or queries, hidden_size),
            second.name: (self.rank + self.turned, hidden_size),
            self.key_value_up.name: (self.n_heads * (self.still + self.value_size), self.rank),
            self.output.name: (hidden_size, self.n_heads * self.value_size),
        }
        if self.query_up is not None:
            found[self.query_up.name] = (queries, self.query_rank)
        heads = f"{self.n_heads} heads of {self.still} + {self.turned} and {self.value_size}"
        vectors = {f"{self.norm.name}.weight": self.rank}
        if self.query_norm is not None:
            vectors[f"{self.query_norm.name}.weight"] = self.query_rank
        ranks = f"ranks {self.query_rank} and {self.rank}"
        return Shapes(found, f"{heads} channels, {ranks}", vectors)

    def steps(self, packing: Packing, cache: Cache | None) -> tuple[Step, ...]:
        last, output = self.key_value_up, self.output

        def attention(weights: Weights, flow: Flow) -> Flow:
            queries, keys, values = self.heads(weights, flow, packing)
            return Flow({output.name: attend(queries, keys, values, packing, scale=self.scale)})

        wide = ((last,),) if self.query_up is None else ((self.query_up,), (last,))
        return (
            Step(sites_of(self.first), self._narrow),
            Step(sites_of(*wide), attention, enter=self._normed),
            last_step(output),
        )

    def _narrow(self, weights: Weights, flow: Flow) -> Flow:
        """From the branch's inputs to the narrow vectors."""
        first, second = (
            layers.apply_linear(linear, weights, flow.inputs[self.first[0].name])
            for linear in self.first
        )
        narrow, turned = map(np.ascontiguousarray, np.split(second, [self.rank], axis=1))
        queries = _QUERIES if self.query_up is None else _NARROW_QUERIES
        return self._normed(weights, Flow({}, {_TURNED: turned, _NARROW: narrow, queries: first}))

    def _normed(self, weights: Weights, flow: Flow) -> Flow:
        """The narrow vectors behind their norms."""
        narrow = layers.apply_norm(self.norm, weights, flow.beside[_NARROW])
        inputs = {self.key_value_up.name: narrow}
        if self.query_up is None:
            return Flow(inputs, flow.beside)
        queries = layers.apply_norm(self.query_norm, weights, flow.beside[_NARROW_QUERIES])
        return Flow({self.query_up.name: queries, **inputs}, flow.beside)

    def heads(
        self, weights: Weights, flow: Flow, packing: Packing
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The queries and keys [n_tokens, n_heads, still + turned] and the values [n_tokens,
        n_heads, value_size] that attention works on. flow: before the second step"""
        if self.query_up is None:
            flat = flow.beside[_QUERIES].copy()
        else:
            flat = layers.apply_linear(self.query_up, weights, flow.inputs[self.query_up.name])
        n_tokens = len(flat)
        queries = flat.reshape(n_tokens, self.n_heads, -1)
        name = self.key_value_up.name
        both = layers.apply_linear(self.key_value_up, weights, flow.inputs[name])
        both = both.reshape(n_tokens, self.n_heads, -1)
        keys = np.empty(queries.shape, dtype=np.float32)
        keys[..., : self.still] = both[..., : self.still]
        turned = flow.beside[_TURNED][:, None].copy()
        cosine, sine = rotations(self.rope, packing.positions, packing.mask.shape[1])
        rotate(turned, cosine, sine, self.rope.interleaved)
        rotate(queries[..., self.still :], cosine, sine, self.rope.interleaved)
        keys[..., self.still :] = turned
        return queries, keys, both[..., self.still :]
