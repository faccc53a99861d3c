"""Multi-head attention as a branch against its formula, one query of one head at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ptq_cli.models.forward.attention import HeadBias, pack
from ptq_cli.models.forward.branch import Flow
from ptq_cli.models.forward.layers import Linear, fetch
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.rope import Rope

RANDOM = np.random.default_rng(13)
MASK = np.array([[1] * 9, [0] * 4 + [1] * 5, [1] * 7 + [0] * 2])
PACKING = pack(MASK.shape, MASK)
PLAIN = MultiHead(
    tuple(Linear(name) for name in ("q", "k", "v")), Linear("o"), 4, 2, head_dim=6, scale=0.4
)
WEIGHTS = {
    f"{name}.weight": (RANDOM.standard_normal(shape) / 4).astype(np.float32)
    for name, shape in {"q": (24, 16), "k": (12, 16), "v": (12, 16), "o": (16, 24)}.items()
}
GATED = {**WEIGHTS, "q.weight": RANDOM.standard_normal((48, 16)).astype(np.float32) / 4}
SINKS = RANDOM.standard_normal(4).astype(np.float32)


def found(branch: MultiHead, weights: Any, inputs: Any) -> Any:
    flow = Flow({"q": inputs})
    for step in branch.steps(PACKING, None):
        assert set(step.sites) == set(flow.inputs)
        flow = step.apply(weights, flow)
    return flow.outputs


def slow(branch: MultiHead, weights: Any, inputs: Any) -> Any:
    """One sequence after the other."""
    out = np.zeros((len(inputs), 24))
    linear = {name: inputs @ weights[f"{name}.weight"].astype(float).T for name in "qkv"}
    for own in PACKING.sequences:
        columns = PACKING.positions[own]
        q, k, v = (linear[name][own].reshape(own.stop - own.start, -1, 6) for name in "qkv")
        for i, head in np.ndindex(len(columns), 4):
            query = turned(branch, q[i, 2 * head if branch.gated else head], columns[i])
            seen = [j for j in range(i + 1) if together(branch, columns, i, j)]
            scores = [0.4 * turned(branch, k[j, head // 2], columns[j]) @ query for j in seen]
            share = np.exp(np.array(scores))
            total = share.sum() + (np.exp(SINKS[head]) if branch.bias else 0)
            mixed = share / total @ v[seen, head // 2]
            if branch.gated:
                mixed = mixed / (1 + np.exp(-q[i, 2 * head + 1]))
            out[own.start + i, 6 * head : 6 * head + 6] = mixed
    return out @ weights["o.weight"].astype(float).T


def together(branch: MultiHead, columns: Any, i: int, j: int) -> bool:
    """Whether two tokens lie in one chunk, counted from the first token."""
    first, size = columns[0], branch.chunk or 100
    return bool((columns[i] - first) // size == (columns[j] - first) // size)


def turned(branch: MultiHead, head: Any, column: int) -> Any:
    if branch.rope is None:
        return head
    pairs = head.reshape(3, 2).T if branch.rope.interleaved else head.reshape(2, 3)
    angles = column * branch.rope.theta ** (-np.arange(3) / 3)
    complex_ = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles)
    both = np.array([complex_.real, complex_.imag])
    return both.T.ravel() if branch.rope.interleaved else both.ravel()


@pytest.mark.parametrize(
    "change",
    [
        {"rope": Rope(6, 100.0)},
        {"rope": Rope(6, 100.0, interleaved=True)},
        {"chunk": 4},
        {"bias": lambda weights, packing: HeadBias(sinks=fetch(weights, "sinks"))},
        {"gated": True},
        {"gated": True, "rope": Rope(6, 100.0), "chunk": 3},
    ],
    ids=["rope", "interleaved", "chunks", "sinks", "gates", "all"],
)
def test_a_branch_equals_one_query_at_a_time(change: Any) -> None:
    branch = replace(PLAIN, **change)
    weights = {**(GATED if branch.gated else WEIGHTS), "sinks": SINKS}
    inputs = RANDOM.standard_normal((PACKING.n_tokens, 16)).astype(np.float32)
    wanted = slow(branch, weights, inputs.astype(float))
    np.testing.assert_allclose(found(branch, weights, inputs), wanted, atol=5e-6)
    assert np.abs(wanted - slow(PLAIN, WEIGHTS, inputs.astype(float))).max() > 1e-2
