"""The forward of a model in NumPy, one block at a time, one site of linears at a time.

A block is a row of stages: of an attention and an MLP these are attention_in, attention_out,
mlp_in, mlp_out; where the two stand side by side, in and out. Between two stages a `State` holds
the residual and the inputs that the next linears are about to see, so a caller may look at them,
round those linears, and let the next stage use the rounded weights:

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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.architecture import Architecture, Block
from ptq_cli.models.forward.attention import Cache, Packing
from ptq_cli.models.forward.branch import Flow, Step
from ptq_cli.models.forward.layers import Weights

ATTENTION, MLP = "attention", "mlp"  # the branches, as the roles of norms begin
Steps = tuple[Step, ...]


@dataclass(frozen=True)
class State:
    """A block between two stages.

    hidden: the residual, [n_tokens, hidden_size]
    flow: of its branches
    """

    hidden: FloatArray
    flow: Flow = field(default_factory=Flow)

    @property
    def inputs(self) -> Mapping[str, FloatArray]:
        """site (its first linear's name) → float32 [n, in_features] that it sees next."""
        return self.flow.inputs


@dataclass(frozen=True)
class Stage:
    """One step of a block: `apply` puts the inputs of `sites` through their linears and goes on to
    the inputs of the next stage. sites: site -> names of the linears that share its inputs.

    enter: makes the state before it anew where norms give it, which may have changed
    routed: the sites of experts, in their order
    adds: the site whose linear's outputs are added to the residual as they are, if there is one
    """

    sites: Mapping[str, tuple[str, ...]]
    apply: Callable[[Weights, State], State]
    enter: Callable[[Weights, State], State] | None = None
    routed: tuple[str, ...] = ()
    adds: str | None = None


def embed(arch: Architecture, weights: Weights, tokens: Array, packing: Packing) -> FloatArray:
    """The residual before the first block, [n_tokens, hidden_size].

    tokens: integers [n_sequences, length]. Raises InputError for tokens or positions out of range.
    """
    ids = packing.flat(tokens)
    hidden = _rows(weights, arch.embedding, ids, "token")
    if arch.embedding_scale != 1:
        hidden = hidden * np.float32(arch.embedding_scale)
    hidden = layers.apply_norm(arch.embedding_norm, weights, hidden)
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
        return State(hidden, Flow({arch.head_module: finish(arch, weights, hidden)}))
    block = arch.blocks[index]
    if block.parallel:
        return _enter_both(block, weights, hidden)
    return _enter(block, ATTENTION, weights, hidden)


def stages(
    arch: Architecture, index: int, packing: Packing, cache: Cache | None = None
) -> tuple[Stage, ...]:
    """The stages of block `index`, in order; behind the last block, the head's, which ends the
    model. cache: what becomes of the keys and values that its attention caches; None: nothing"""
    if index == len(arch.blocks):
        head = arch.head_module
        return (Stage({head: (head,)}, lambda weights, state: State(state.hidden)),)
    block = arch.blocks[index]
    mixer, mlp = block.mixer.steps(packing, cache), block.feed_forward.steps(packing, None)
    if block.parallel:
        return tuple(_side_by_side(block, mixer, mlp))
    return (*_in_turn(block, ATTENTION, mixer), *_in_turn(block, MLP, mlp))


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
    if arch.logit_scale != 1:
        scores *= np.float32(arch.logit_scale)
    layers.cap(scores, arch.logit_softcap)
    return scores


def _enter(block: Block, branch: str, weights: Weights, hidden: FloatArray) -> State:
    """Before a branch that has the residual to itself."""
    part = block.mixer if branch == ATTENTION else block.feed_forward
    inputs = layers.apply_norm(block.norms.get(f"{branch}_in"), weights, hidden)
    return State(hidden, Flow(dict.fromkeys(part.first_sites, inputs)))


def _in_turn(block: Block, branch: str, steps: Steps) -> Iterator[Stage]:
    """The stages of a branch that has the residual to itself."""

    def apply(step: Step, weights: Weights, state: State) -> State:
        flow = step.apply(weights, state.flow)
        if flow.outputs is None:
            return State(state.hidden, flow)
        hidden = _added(block, weights, state.hidden, {branch: flow.outputs})
        return _enter(block, MLP, weights, hidden) if branch == ATTENTION else State(hidden)

    def enter(step: Step, weights: Weights, state: State) -> State:
        if step is steps[0]:
            return _enter(block, branch, weights, state.hidden)
        return state if step.enter is None else State(state.hidden, step.enter(weights, state.flow))

    for step in steps:
        adds = _adds(block, branch, step) if step is steps[-1] else None
        yield Stage(step.sites, partial(apply, step), partial(enter, step), step.routed, adds)


def _enter_both(block: Block, weights: Weights, hidden: FloatArray) -> State:
    """Before two branches side by side: one site where one norm feeds both, else one each."""
    state = _enter(block, ATTENTION, weights, hidden)
    if _joined(block):
        return state
    beside = _enter(block, MLP, weights, hidden)
    return State(hidden, Flow({**state.inputs, **beside.inputs}))


def _again_both(block: Block, weights: Weights, state: State) -> State:
    return _enter_both(block, weights, state.hidden)


def _side_by_side(block: Block, mixer: Steps, mlp: Steps) -> Iterator[Stage]:
    """The stages of two branches that both see the residual before the block."""
    theirs = block.feed_forward.first_sites

    def apply(steps: Steps, weights: Weights, state: State) -> State:
        flow = state.flow
        if steps[0] is mixer[0] and _joined(block):
            (shared,) = flow.inputs.values()
            flow = Flow({**flow.inputs, **dict.fromkeys(theirs, shared)})
        ours, beside = (step.apply(weights, flow) for step in steps)
        if ours.outputs is None or beside.outputs is None:
            between = {**ours.beside, **beside.beside}
            return State(state.hidden, Flow({**ours.inputs, **beside.inputs}, between))
        branches = {ATTENTION: ours.outputs, MLP: beside.outputs}
        return State(_added(block, weights, state.hidden, branches))

    for steps in zip(mixer, mlp, strict=True):
        first, last = steps[0] is mixer[0], steps[0] is mixer[-1]
        sites = {**steps[0].sites, **steps[1].sites}
        if first and _joined(block):
            linears = tuple(name for step in steps for own in step.sites.values() for name in own)
            sites = {block.mixer.first_sites[0]: linears}
        # what is wrong with the residual is made up for once
        adds = _adds(block, MLP, steps[1]) if last else None
        enter = partial(_again_both, block) if first else None
        yield Stage(sites, partial(apply, steps), enter, adds=adds)


def _joined(block: Block) -> bool:
    """Whether one norm feeds both branches of a parallel block."""
    return block.norms.get("attention_in") == block.norms.get("mlp_in")


def _adds(block: Block, branch: str, step: Step) -> str | None:
    """The site of a last step whose outputs are added to the residual as they are."""
    changed = f"{branch}_out" in block.norms or block.residual_scale != 1
    return None if changed or len(step.sites) > 1 or step.routed else next(iter(step.sites))


def _added(
    block: Block, weights: Weights, hidden: FloatArray, branches: Mapping[str, FloatArray]
) -> FloatArray:
    """Residual plus the outputs of branches, with the norms that the family puts around the sum."""
    for branch, outputs in branches.items():
        own = layers.apply_norm(block.norms.get(f"{branch}_out"), weights, outputs)
        if block.residual_scale != 1:
            own *= np.float32(block.residual_scale)
        if block.residual_normed:
            hidden = layers.apply_norm(block.norms.get(f"{branch}_in"), weights, hidden)
        own += hidden
        hidden = layers.apply_norm(block.norms.get(f"{branch}_sum"), weights, own)
    return hidden
