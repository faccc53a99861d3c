"""The forward of a model in NumPy, one block at a time, one site of linears at a time.

A block is a row of stages: attention_in, attention_out, (router,) mlp_in, mlp_out. Between two
stages a `State` holds the residual and the inputs that the next linears are about to see, so a
caller may look at them, round those linears, and let the next stage use the rounded weights:

    state = begin(arch, block, weights, hidden)
    for stage in stages(arch, block, packing):
        …look at state.inputs, change what `weights` gives for stage.sites…
        state = stage.apply(weights, state)
    hidden = state.hidden

Tokens are packed (`pack`, attention.py): `hidden` is float32 [n_tokens, hidden_size], no padding.
`weights` gives a tensor by its name in the checkpoint, in any float dtype, when it is needed.
Give BLAS one thread and run batches side by side in threads: the products inside attention are
small, and OpenBLAS with more threads is many times slower on them where the machine is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.architecture import Architecture, Block, Experts
from ptq_cli.models.forward.attention import Cache, Packing, attend
from ptq_cli.models.forward.heads import make_heads
from ptq_cli.models.forward.layers import Linear, Weights


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which expert: rows[e] [n_e], and their weights share[e] [n_e, 1]."""

    rows: tuple[NDArray[np.int64], ...]
    share: tuple[FloatArray, ...]


@dataclass(frozen=True)
class State:
    """A block between two stages.

    hidden: the residual, [n_tokens, hidden_size]
    inputs: site (its first linear's name) -> float32 [n, in_features] that it sees next; n is
        n_tokens, or for an expert the tokens routed to it, which may be none
    """

    hidden: FloatArray
    inputs: Mapping[str, FloatArray] = field(default_factory=dict)
    routing: Routing | None = None


@dataclass(frozen=True)
class Stage:
    """One step of a block: `apply` puts the inputs of `sites` through their linears and goes on to
    the inputs of the next stage. sites: site -> names of the linears that share its inputs.

    enter: the state before it from the residual, where nothing but a norm lies between
    adds: whether the outputs of its linears are added to the residual as they are
    """

    sites: Mapping[str, tuple[str, ...]]
    apply: Callable[[Weights, State], State]
    enter: Callable[[Weights, FloatArray], State] | None = None
    adds: bool = False


def embed(arch: Architecture, weights: Weights, tokens: Array, packing: Packing) -> FloatArray:
    """The residual before the first block, [n_tokens, hidden_size].

    tokens: integers [n_sequences, length]. Raises InputError for tokens or positions out of range.
    """
    ids = packing.flat(tokens)
    hidden = _rows(weights, arch.embedding, ids, "token")
    if arch.forward.embedding_scaled:
        hidden = hidden * np.float32(arch.hidden_size**0.5)
    if arch.projections:
        hidden = layers.apply_linear(arch.projections[0], weights, hidden)
    if arch.positions is None:
        return hidden
    columns = packing.positions
    if arch.forward.position_counts:
        columns = packing.flat(np.cumsum(packing.mask, axis=1)) - 1
    columns = columns + arch.forward.position_offset
    return hidden + _rows(weights, arch.positions, columns, "position")


def _rows(weights: Weights, name: str, ids: Array, what: str) -> FloatArray:
    table = layers.stored(weights, name)
    if ids.size and not (ids.min() >= 0 and ids.max() < len(table)):
        raise InputError(f"{what} {ids.max()} is out of range: {name} has {len(table)} rows")
    return np.asarray(table[ids], dtype=np.float32)


def begin(arch: Architecture, index: int, weights: Weights, hidden: FloatArray) -> State:
    """Block `index` before its first stage; behind the last block, the head before its own."""
    if index == len(arch.blocks):
        return State(hidden, {arch.head_module: finish(arch, weights, hidden)})
    block = arch.blocks[index]
    inputs = layers.apply_norm(block.norms.get("attention_in"), weights, hidden)
    return State(hidden, {block.qkv[0].name: inputs})


def stages(
    arch: Architecture, index: int, packing: Packing, cache: Cache | None = None
) -> tuple[Stage, ...]:
    """The stages of block `index`, in order; behind the last block, the head's, which ends the
    model. cache: what becomes of the keys and values that its attention caches; None: nothing"""
    if index == len(arch.blocks):
        head = arch.head_module
        return (Stage({head: (head,)}, lambda weights, state: State(state.hidden)),)
    block = arch.blocks[index]

    def attention_in(weights: Weights, state: State) -> State:
        inputs = state.inputs[block.qkv[0].name]
        mixed = _attention(arch, block, weights, inputs, packing, cache)
        return State(state.hidden, {block.output.name: mixed})

    def attention_out(weights: Weights, state: State) -> State:
        branch = layers.apply_linear(block.output, weights, state.inputs[block.output.name])
        return _enter_mlp(block, weights, _add(block, "attention", weights, state.hidden, branch))

    return (
        Stage(_sites(block.qkv), attention_in, partial(begin, arch, index)),
        Stage(_sites((block.output,)), attention_out, adds="attention_out" not in block.norms),
        *_mlp_stages(arch, block),
    )


def forward_block(
    arch: Architecture,
    index: int,
    weights: Weights,
    hidden: FloatArray,
    packing: Packing,
    observe: Callable[[str, FloatArray], None] | None = None,
    cache: Cache | None = None,
) -> FloatArray:
    """The residual after block `index`; `hidden` is left as it is.

    observe: called with each site's first linear and its inputs, before they are used.
    cache: as of `stages`
    """
    state = begin(arch, index, weights, hidden)
    for stage in stages(arch, index, packing, cache):
        if observe is not None:
            for site, inputs in state.inputs.items():
                observe(site, inputs)
        state = stage.apply(weights, state)
    return state.hidden


def finish(arch: Architecture, weights: Weights, hidden: FloatArray) -> FloatArray:
    """What the head sees: the residual after the last block, normalised."""
    hidden = layers.apply_norm(arch.final_norm, weights, hidden)
    return layers.apply_linear(arch.projections[1], weights, hidden) if arch.projections else hidden


def logits(
    arch: Architecture,
    weights: Weights,
    finished: FloatArray,
    vocabulary: slice = slice(None),
) -> FloatArray:
    """Scores of the tokens of `vocabulary` after each row of `finished`, float32 [n, n_ids]."""
    table = layers.stored(weights, arch.head)
    finished = layers.round_inputs(weights, arch.head, finished)
    scores: FloatArray = finished @ np.asarray(table[vocabulary], dtype=np.float32).T
    layers.cap(scores, arch.logit_softcap)
    return scores


def _sites(*groups: tuple[Linear, ...]) -> dict[str, tuple[str, ...]]:
    return {linears[0].name: tuple(linear.name for linear in linears) for linears in groups}


def _enter_mlp(block: Block, weights: Weights, hidden: FloatArray) -> State:
    """A block before its MLP or router."""
    first = block.experts.router if block.experts else block.mlp_in[0]
    inputs = layers.apply_norm(block.norms.get("mlp_in"), weights, hidden)
    return State(hidden, {first.name: inputs})


def _add(
    block: Block, branch: str, weights: Weights, hidden: FloatArray, outputs: FloatArray
) -> FloatArray:
    """Residual plus a branch's outputs, with the norms that the family puts around the sum."""
    outputs = layers.apply_norm(block.norms.get(f"{branch}_out"), weights, outputs)
    outputs += hidden
    return layers.apply_norm(block.norms.get(f"{branch}_sum"), weights, outputs)


def _attention(
    arch: Architecture,
    block: Block,
    weights: Weights,
    inputs: FloatArray,
    packing: Packing,
    cache: Cache | None,
) -> FloatArray:
    """From the inputs of qkv to those of the output linear."""
    queries, keys, values = make_heads(arch, block, weights, inputs, packing)
    if cache is not None:
        cache(keys, values)
    return attend(
        queries,
        keys,
        values,
        packing,
        scale=block.scale,
        window=block.window,
        softcap=arch.attention_softcap,
    )


def _mlp_stages(arch: Architecture, block: Block) -> tuple[Stage, ...]:
    """The stages of the MLP, or of the experts behind their router."""
    experts, enter = block.experts, partial(_enter_mlp, block)
    before = experts.inputs if experts else (block.mlp_in,)
    behind = experts.outputs if experts else (block.mlp_out,)
    width = experts.width if experts else arch.intermediate_size

    def mlp_in(weights: Weights, state: State) -> State:
        inner = {}
        for linears, down in zip(before, behind, strict=True):
            inputs = state.inputs[linears[0].name]
            empty = np.zeros((0, width), dtype=np.float32)
            inner[down.name] = _inner(arch, linears, weights, inputs) if len(inputs) else empty
        return State(state.hidden, inner, state.routing)

    def mlp_out(weights: Weights, state: State) -> State:
        if state.routing is None:
            branch = layers.apply_linear(block.mlp_out, weights, state.inputs[block.mlp_out.name])
        else:
            branch = np.zeros_like(state.hidden)
            routes = zip(behind, state.routing.rows, state.routing.share, strict=True)
            for down, rows, share in routes:
                if len(rows):
                    outputs = layers.apply_linear(down, weights, state.inputs[down.name])
                    branch[rows] += outputs * share
        return State(_add(block, "mlp", weights, state.hidden, branch))

    adds = experts is None and "mlp_out" not in block.norms
    last = Stage(_sites(*((down,) for down in behind)), mlp_out, adds=adds)
    if experts is None:
        return Stage(_sites(*before), mlp_in, enter), last
    router = Stage(_sites((experts.router,)), partial(_route, experts), enter)
    return router, Stage(_sites(*before), mlp_in), last


def _inner(
    arch: Architecture, linears: tuple[Linear, ...], weights: Weights, inputs: FloatArray
) -> FloatArray:
    """From the inputs of gate and up to those of down."""
    parts = [layers.apply_linear(linear, weights, inputs) for linear in linears]
    if arch.forward.gated and len(parts) == 1:
        parts = np.split(parts[0], 2, axis=1)
    return layers.activate(arch.activation, parts[0], parts[1] if arch.forward.gated else None)


def _route(experts: Experts, weights: Weights, state: State) -> State:
    """From the inputs of the router to those of each expert: each token goes to the `top_k` that
    have the largest share of the softmax of its scores."""
    inputs = state.inputs[experts.router.name]
    scores = layers.apply_linear(experts.router, weights, inputs)
    share: Any = np.exp(scores - scores.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    count = scores.shape[1]
    best = np.argpartition(share, count - experts.top_k, axis=1)[:, count - experts.top_k :]
    chosen = np.zeros(share.shape, dtype=np.bool_)
    np.put_along_axis(chosen, best, True, axis=1)
    share = np.where(chosen, share, 0)
    if experts.normalised:
        share /= share.sum(axis=1, keepdims=True)
    rows = tuple(np.nonzero(column)[0] for column in chosen.T)
    routing = Routing(rows, tuple(share[own, e, None] for e, own in enumerate(rows)))
    names = (linears[0].name for linears in experts.inputs)
    some = {name: inputs[own] for name, own in zip(names, rows, strict=True)}
    return State(state.hidden, some, routing)
