"""Recurrences over a sequence: the gated delta rule, Mamba-2, and the convolution before them.

A head has a state, a matrix that each token makes smaller and adds to. Tokens go in chunks: inside
a chunk the recurrence is written out as products of matrices, with the decay between every two
tokens, and only the state goes on from chunk to chunk. Each sequence begins with a state of zeros;
masked tokens inside one are skipped. Tokens are packed as of `Packing` (attention.py).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward.attention import Packing
from ptq_cli.models.forward.layers import CHUNK
from ptq_cli.numerics.parallel import strips

TOKENS = 32  # of a chunk of a recurrence
STATE = 1 << 17  # values of the states in hand, at most, where one head does not have more


def causal_convolution(
    inputs: FloatArray, kernel: FloatArray, bias: FloatArray | None, packing: Packing
) -> FloatArray:
    """Each channel convolved with its own kernel over a token and those before it.

    inputs: float32 [n_tokens, n_channels]; kernel: [n_channels, width], the last for the token
    itself; bias: [n_channels] or None. Returns float32 [n_tokens, n_channels].
    """
    by_distance = np.ascontiguousarray(kernel.T[::-1])
    outputs = np.empty(inputs.shape, dtype=np.float32)
    step = max(1, CHUNK // inputs.shape[1])
    for own in packing.sequences:
        for start in range(own.start, own.stop, step):
            stop = min(start + step, own.stop)
            np.multiply(inputs[start:stop], by_distance[0], out=outputs[start:stop])
            for distance in range(1, len(by_distance)):
                first = max(start, min(own.start + distance, stop))
                before = inputs[first - distance : stop - distance]
                outputs[first:stop] += before * by_distance[distance]
    if bias is not None:
        outputs += bias
    return outputs


def gated_delta_rule(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    decay: FloatArray,
    rate: FloatArray,
    packing: Packing,
) -> FloatArray:
    """What each token reads from its head's state [key_dim, value_dim] after it wrote to it:

        state ← exp(decay) · state
        state ← state + rate · key · (value − keyᵀ · state)ᵀ
        output = queryᵀ · state

    Yang et al., arXiv 2412.06464. What a token of a chunk writes depends on what those before it
    in the chunk wrote, which is a triangular system.

    queries, keys: float32 [n_tokens, n_key_heads, key_dim], each for as many neighbouring heads
    values: float32 [n_tokens, n_heads, value_dim]
    decay, not above 0, and rate: float32 [n_tokens, n_heads]
    Returns float32 [n_tokens, n_heads, value_dim].
    """
    n_tokens, n_key_heads, key_dim = keys.shape
    n_heads, value_dim = values.shape[1:]
    shape = (n_tokens, n_key_heads, n_heads // n_key_heads)
    grouped, decay, rate = (
        values.reshape(*shape, value_dim),
        decay.reshape(shape),
        rate.reshape(shape),
    )
    outputs = np.empty(grouped.shape, dtype=np.float32)
    at_once = STATE // (shape[2] * key_dim * value_dim)
    for own in packing.sequences:
        for heads in strips(n_key_heads, max(1, at_once)):
            some = (own, heads)
            _delta_heads(
                queries[some], keys[some], grouped[some], decay[some], rate[some], outputs[some]
            )
    return outputs.reshape(values.shape)


def _delta_heads(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    decay: FloatArray,
    rate: FloatArray,
    outputs: FloatArray,
) -> None:
    """Fills `outputs`, for some key heads of one sequence. queries, keys: [n, n_key_heads, key_dim]
    values, outputs: [n, n_key_heads, heads, value_dim]; decay, rate: [n, n_key_heads, heads]"""
    _, n_key_heads, group, value_dim = values.shape
    state = np.zeros((n_key_heads, group, keys.shape[2], value_dim), dtype=np.float32)
    for rows in strips(len(keys), TOKENS):
        query, key = (x[rows].transpose(1, 0, 2)[:, None] for x in (queries, keys))
        turned = key.swapaxes(-1, -2)
        between, since, until = _decays(decay[rows].transpose(1, 2, 0))
        own_rate = rate[rows].transpose(1, 2, 0)[..., None]

        system = key @ turned * between
        system *= own_rate
        count = np.arange(system.shape[-1])
        system[..., count, count] = 1
        written = values[rows].transpose(1, 2, 0, 3) - since * (key @ state)
        written = np.linalg.solve(system, own_rate * written)

        read = since * (query @ state)
        read += query @ turned * between @ written
        outputs[rows] = read.transpose(2, 0, 1, 3)
        state *= since[..., -1:, :]
        state += turned @ (until * written)


def mamba2_scan(
    inputs: FloatArray,
    dt: FloatArray,
    a: FloatArray,
    b: FloatArray,
    c: FloatArray,
    d: FloatArray,
    packing: Packing,
) -> FloatArray:
    """What each token reads from its head's state [state_size, head_dim] after it wrote to it:

        state ← exp(dt · a) · state + b · (dt · input)ᵀ
        output = cᵀ · state + d · input

    Dao and Gu, arXiv 2405.21060, section 6.

    inputs: float32 [n_tokens, n_heads, head_dim]; dt: [n_tokens, n_heads]
    a, not above 0, and d: [n_heads]
    b, c: [n_tokens, n_groups, state_size], each for as many neighbouring heads
    Returns float32 [n_tokens, n_heads, head_dim].
    """
    _, n_groups, state_size = b.shape
    _, n_heads, head_dim = inputs.shape
    group = n_heads // n_groups
    scaled, decay = inputs * dt[..., None], dt * a
    outputs: FloatArray = inputs * d[:, None]
    at_once = STATE // (state_size * head_dim)
    for own, number in product(packing.sequences, range(n_groups)):
        write, read = b[own, number], c[own, number]
        for heads in strips(group, max(1, at_once)):
            some = (own, slice(number * group + heads.start, number * group + heads.stop))
            _mamba_heads(scaled[some], decay[some], write, read, outputs[some])
    return outputs


def _mamba_heads(
    inputs: FloatArray, decay: FloatArray, b: FloatArray, c: FloatArray, outputs: FloatArray
) -> None:
    """Adds to `outputs` what some heads of a group read, for one sequence. inputs, outputs:
    [n, heads, head_dim]; decay: [n, heads]; b, c: [n, state_size]"""
    _, heads, head_dim = inputs.shape
    state = np.zeros((b.shape[1], heads * head_dim), dtype=np.float32)
    for rows in strips(len(inputs), TOKENS):
        write, read, values = b[rows], c[rows], inputs[rows]
        between, since, until = _decays(decay[rows].T)
        within = read @ write.T * between @ values.transpose(1, 0, 2)
        before = (read @ state).reshape(values.shape)
        outputs[rows] += within.transpose(1, 0, 2) + since.transpose(1, 0, 2) * before
        state *= np.repeat(since[:, -1, 0], head_dim)
        state += write.T @ (until.transpose(1, 0, 2) * values).reshape(len(values), -1)


def _decays(decay: FloatArray) -> tuple[Any, Any, Any]:
    """How much of a state is left between the tokens of a chunk, from the logarithm of what each
    leaves, [..., n].

    Returns what is left
        after token i of what token j wrote, [..., n, n], 0 where j > i
        after token i of the state before the chunk, [..., n, 1]
        after the chunk of what token j wrote, [..., n, 1]
    """
    total = np.cumsum(decay, axis=-1, dtype=np.float64)  # differences of large sums count
    between = (total[..., :, None] - total[..., None, :]).astype(np.float32)
    n = decay.shape[-1]
    np.copyto(between, np.float32(-np.inf), where=~np.tri(n, dtype=np.bool_))
    np.exp(between, out=between)
    since = np.exp(total).astype(np.float32)[..., None]
    return between, since, between[..., -1, :, None]
