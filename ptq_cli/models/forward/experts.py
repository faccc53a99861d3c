"""A mixture of experts behind a router, some with an expert beside them that every token sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.attention import Cache, Packing
from ptq_cli.models.forward.branch import Flow, Routing, Shapes, Step, sites_of
from ptq_cli.models.forward.layers import Linear, Weights
from ptq_cli.models.forward.mlp import MLP

Weigh = Callable[[Weights, FloatArray], FloatArray]
"""The router's scores [n_tokens, n_experts] → each token's share of each expert, 0 where it does
not go there. It may take further tensors from the weights."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes through `top_k` of them.

    weigh: what becomes of the router's scores
    vectors: tensors of a value an expert that `weigh` reads
    hidden_size: of what each expert gives
    scale_inputs: shares multiply the inputs of the experts instead of their outputs
    shared: an expert that every token goes through; shared_gate: a linear whose sigmoid weighs it
    """

    router: Linear
    experts: tuple[MLP, ...]
    top_k: int
    weigh: Weigh
    hidden_size: int
    scale_inputs: bool = False
    shared: MLP | None = None
    shared_gate: Linear | None = None
    vectors: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """in_features of an expert's last linear."""
        return self.experts[0].width

    @property
    def first_sites(self) -> tuple[str, ...]:
        return (self.router.name,) if self.shared is None else (self.router.name, self.shared.site)

    @property
    def running(self) -> int:
        shared = 0 if self.shared is None else self.shared.running
        return 3 * self.top_k * (self.width + self.hidden_size) + shared

    @property
    def kept(self) -> int:
        shared = 0 if self.shared is None else self.shared.kept + self.hidden_size
        return self.top_k * max(self.width, self.hidden_size) + shared

    def shapes(self, hidden_size: int) -> Shapes:
        found = {self.router.name: (len(self.experts), hidden_size)}
        if self.shared_gate is not None:
            found[self.shared_gate.name] = (1, hidden_size)
        sizes = f"{len(self.experts)} experts with {self.experts[0].shapes(hidden_size).sizes}"
        beside = () if self.shared is None else (self.shared,)
        for mlp in (*beside, *self.experts):
            found |= mlp.shapes(hidden_size).of
        if self.shared is not None:
            sizes += f", one for all with {self.shared.shapes(hidden_size).sizes}"
        return Shapes(found, sizes, dict.fromkeys(self.vectors, len(self.experts)))

    def steps(self, packing: Packing, cache: Cache | None) -> tuple[Step, ...]:
        first = tuple(expert.site for expert in self.experts)
        last = tuple(expert.output.name for expert in self.experts)
        gate = () if self.shared_gate is None else (self.shared_gate,)
        seen: list[tuple[Linear, ...]] = [(self.router, *gate)]
        outputs: list[tuple[Linear, ...]] = [(expert.output,) for expert in self.experts]
        if self.shared is not None:
            seen.append(self.shared.inputs)
            outputs.append((self.shared.output,))
        return (
            Step(sites_of(*seen), self._route),
            Step(sites_of(*(expert.inputs for expert in self.experts)), self._inwards, first),
            Step(sites_of(*outputs), partial(self._outwards, packing.n_tokens), last),
        )

    def _route(self, weights: Weights, flow: Flow) -> Flow:
        """From the inputs of the router to those of each expert that a token has a share of."""
        inputs = flow.inputs[self.router.name]
        share = self.weigh(weights, layers.apply_linear(self.router, weights, inputs))
        rows = tuple(np.nonzero(column)[0] for column in share.T)
        shares = tuple(share[own, e, None] for e, own in enumerate(rows))
        sites = tuple(expert.site for expert in self.experts)
        some = {site: inputs[own] for site, own in zip(sites, rows, strict=True)}
        if self.scale_inputs:
            some = {site: some[site] * part for site, part in zip(sites, shares, strict=True)}
        beside = {}
        if self.shared is not None:
            some[self.shared.output.name] = self.shared.inner(
                weights, flow.inputs[self.shared.site]
            )
        if self.shared_gate is not None:
            gate = layers.apply_linear(self.shared_gate, weights, inputs)
            beside["shared"] = layers.sigmoid(gate)
        return Flow(some, beside, Routing(sites, rows, shares))

    def _inwards(self, weights: Weights, flow: Flow) -> Flow:
        assert flow.routing is not None  # `_route` made it
        inner = {
            expert.output.name: expert.inner(weights, flow.inputs[expert.site])
            for expert in self.experts
        }
        if self.shared is not None:
            name = self.shared.output.name
            inner[name] = flow.inputs[name]
        routing = replace(flow.routing, sites=tuple(e.output.name for e in self.experts))
        return Flow(inner, flow.beside, routing)

    def _outwards(self, n_tokens: int, weights: Weights, flow: Flow) -> Flow:
        routing = flow.routing
        assert routing is not None  # `_route` made it
        outputs = np.zeros((n_tokens, self.hidden_size), dtype=np.float32)
        if self.shared is not None:
            outputs = self.shared.outer(weights, flow.inputs[self.shared.output.name])
        if self.shared_gate is not None:
            outputs *= flow.beside["shared"]
        for expert, rows, share in zip(self.experts, routing.rows, routing.share, strict=True):
            if len(rows):
                own = expert.outer(weights, flow.inputs[expert.output.name])
                outputs[rows] += own if self.scale_inputs else own * share
        return Flow(outputs=outputs)
