"""A branch of a block (its attention, its MLP) as a row of steps.

Between two steps a `Flow` holds what the next linears are about to see, so a caller may look at it,
round those linears, and let the next step use the rounded weights. What a branch needs to know of
the model (names, sizes) are its own fields; a family puts branches together (reader.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward.attention import Cache, Packing
from ptq_cli.models.forward.layers import Linear, Weights, apply_linear


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which expert, one entry an expert each.

    sites: the sites of the experts that come next
    rows: the tokens, [n_e]; share: their weights, [n_e, 1]
    """

    sites: tuple[str, ...]
    rows: tuple[NDArray[np.int64], ...]
    share: tuple[FloatArray, ...]


@dataclass(frozen=True)
class Flow:
    """A branch between two steps.

    inputs: site (its first linear's name) → float32 [n, in_features] that it sees next, or in a
        later step; n is n_tokens, or for an expert the tokens routed to it, which may be none
    beside: what a later step needs besides, by a name of its own, float32 [n_tokens, …]
    outputs: of the whole branch, [n_tokens, hidden_size], once its last step is done
    """

    inputs: Mapping[str, FloatArray] = field(default_factory=dict)
    beside: Mapping[str, FloatArray] = field(default_factory=dict)
    routing: Routing | None = None
    outputs: FloatArray | None = None


@dataclass(frozen=True)
class Step:
    """`apply` puts the inputs of `sites` through their linears and goes on to the inputs of the
    next step, or, in the last one, to the branch's outputs.

    sites: site → names of the linears that share its inputs; all sites of a first step see the
        inputs of the branch
    routed: of these, the experts', in their order
    enter: makes the inputs anew where norms stand between the step before and this one, which may
        have changed
    """

    sites: Mapping[str, tuple[str, ...]]
    apply: Callable[[Weights, Flow], Flow]
    routed: tuple[str, ...] = ()
    enter: Callable[[Weights, Flow], Flow] | None = None


@dataclass(frozen=True)
class Shapes:
    """What config.json makes of a branch's tensors.

    of: linear → (out_features, in_features); sizes: what these come from, in words
    vectors: further tensor → its values
    convolutions: further tensor → its (channels, tokens)
    """

    of: Mapping[str, tuple[int, int]]
    sizes: str
    vectors: Mapping[str, int] = field(default_factory=dict)
    convolutions: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Branch(Protocol):
    """What is added to the residual."""

    def shapes(self, hidden_size: int) -> Shapes:
        """The shapes of its tensors."""

    def steps(self, packing: Packing, cache: Cache | None) -> tuple[Step, ...]:
        """Its steps for packed tokens. cache: what becomes of keys and values that are cached"""

    @property
    def first_sites(self) -> tuple[str, ...]:
        """The sites of its first step."""

    @property
    def running(self) -> int:
        """Values a token, at most, that lie between its inputs and its outputs, both left aside."""

    @property
    def kept(self) -> int:
        """Values a token, at most, that a `Flow` between two steps holds."""


def last_step(output: Linear) -> Step:
    """The step whose linear gives the branch's outputs."""

    def apply(weights: Weights, flow: Flow) -> Flow:
        return Flow(outputs=apply_linear(output, weights, flow.inputs[output.name]))

    return Step(sites_of((output,)), apply)


def sites_of(*groups: tuple[Linear, ...]) -> dict[str, tuple[str, ...]]:
    """Site → names of its linears, for groups of linears that share inputs."""
    return {linears[0].name: tuple(linear.name for linear in linears) for linears in groups}
