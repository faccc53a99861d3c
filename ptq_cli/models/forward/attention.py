"""Causal attention over sequences packed one after the other, without padding.

Queries go in blocks: a block's scores fill a megabyte or two, so that the passes of the softmax
run in cache; keys that a block cannot see, later than it or behind its window, are not touched.
The query heads that share a key head are rows of one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.forward.layers import cap

QUERY_ROWS = 256  # rows (queries × heads that share a key head) of a block of scores
SCORES = 1 << 18  # values of a block of scores, at most, where one head does not need more

Cache = Callable[[FloatArray, FloatArray], None]
"""Changes, in place, the keys and values that are cached, float32 [n_tokens, n_kv_heads, head_dim]:
keys are normed and rotated by then. Attention reads what it leaves."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch [n_sequences, length] went when padding was taken out.

    mask: bool [n_sequences, length], true where there is a token
    starts: first packed row of each sequence, then the number of rows, [n_sequences + 1]
    positions: column of each packed row, [n_tokens]
    """

    mask: NDArray[np.bool_]
    starts: tuple[int, ...]
    positions: NDArray[np.int64]

    @property
    def n_tokens(self) -> int:
        return self.starts[-1]

    def flat(self, batch: Array) -> Array:
        """The rows of `batch` [n_sequences, length, …] that are tokens: [n_tokens, …]."""
        packed: Array = batch[self.mask]
        return packed

    @property
    def sequences(self) -> Iterator[slice]:
        """The packed rows of each sequence, in order."""
        return map(slice, self.starts, self.starts[1:])

    def chunked(self, size: int) -> Packing:
        """The same tokens, each sequence cut every `size` columns from its first token on: under
        it attention is chunked (Llama 4), as no token sees what is before its chunk."""
        starts = [0]
        for own in self.sequences:
            columns = self.positions[own]
            chunk = (columns - columns[:1]) // size
            starts += [own.start + int(row) for row in np.flatnonzero(np.diff(chunk)) + 1]
            starts.append(own.stop)
        return replace(self, starts=tuple(starts))


@dataclass(frozen=True)
class HeadBias:
    """What each head has beside the scores of queries with keys.

    sinks: float32 [n_heads], the score of a key without a value, which every token sees (gpt-oss)
    keys: float32 [n_heads, length], added to the scores of the first, second, … key of a sequence
        (ALiBi: slope · number of the key)
    """

    sinks: FloatArray | None = None
    keys: FloatArray | None = None

    def heads(self, n_kv: int) -> HeadBias:
        """With the heads that share a key head under it: sinks [n_kv, group, 1], keys
        [n_kv, group, length]."""
        sinks = None if self.sinks is None else self.sinks.reshape(n_kv, -1, 1)
        keys = None if self.keys is None else self.keys.reshape(n_kv, -1, self.keys.shape[1])
        return HeadBias(sinks, keys)

    def block(self, heads: slice, keys: slice) -> HeadBias:
        """That of some key heads and keys."""
        sinks = None if self.sinks is None else self.sinks[heads]
        return HeadBias(sinks, None if self.keys is None else self.keys[heads, :, keys])


def pack(shape: tuple[int, ...], mask: Array | None = None) -> Packing:
    """The packing of a batch of `shape` (n_sequences, length); `mask` is 0 or false at padding."""
    if len(shape) != 2:
        raise InputError(f"tokens have shape {shape}; [n, length] is needed")
    if mask is None:
        mask = np.ones(shape, dtype=np.bool_)
    if mask.shape != shape:
        raise InputError(f"the mask has shape {mask.shape}, the tokens {shape}")
    mask = mask.astype(np.bool_)
    starts = np.concatenate(([0], np.cumsum(mask.sum(axis=1))))
    return Packing(mask, tuple(int(start) for start in starts), np.nonzero(mask)[1])


def attend(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: HeadBias | None = None,
) -> FloatArray:
    """`softmax(scale · queries · keysᵀ) · values`, each token seeing itself and earlier ones.

    queries: float32 [n_tokens, n_heads, head_dim]; keys: [n_tokens, n_kv_heads, head_dim]
    values: float32 [n_tokens, n_kv_heads, value_dim]
    window: tokens that a token sees, itself included; None is all
    softcap: scores become `softcap · tanh(scores / softcap)`
    Returns float32 [n_tokens, n_heads · value_dim].
    """
    n_tokens, n_heads, head_dim = queries.shape
    n_kv, value_dim = keys.shape[1], values.shape[2]
    group = n_heads // n_kv
    outputs = np.empty((n_tokens, n_kv, group, value_dim), dtype=np.float32)
    by_head = outputs.transpose(1, 0, 2, 3)
    turned = np.empty((n_kv, n_tokens, group, head_dim), dtype=np.float32)
    grouped = queries.reshape(n_tokens, n_kv, group, head_dim).transpose(1, 0, 2, 3)
    np.multiply(grouped, np.float32(scale), out=turned)
    turned_keys = np.ascontiguousarray(keys.transpose(1, 0, 2))
    turned_values = np.ascontiguousarray(values.transpose(1, 0, 2))
    bias = HeadBias() if bias is None else bias.heads(n_kv)
    for own in packing.sequences:
        _attend_sequence(
            turned[:, own],
            turned_keys[:, own],
            turned_values[:, own],
            by_head[:, own],
            packing.positions[own],
            window,
            softcap,
            bias,
        )
    return outputs.reshape(n_tokens, n_heads * value_dim)


def _attend_sequence(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    outputs: FloatArray,
    positions: NDArray[np.int64],
    window: int | None,
    softcap: float | None,
    bias: HeadBias,
) -> None:
    """Fills `outputs` [n_kv, n, group, value_dim] (any strides) for one sequence.

    queries: [n_kv, n, group, head_dim], scaled; keys: [n_kv, n, head_dim]; positions: [n]
    values: [n_kv, n, value_dim]
    """
    n_kv, n, group, head_dim = queries.shape
    step = max(1, QUERY_ROWS // group)
    for start in range(0, n, step):
        stop = min(start + step, n)
        first, hidden = 0, []  # the first key that is seen; keys, and who does not see them
        if window is not None:
            first, near = np.searchsorted(positions, positions[[start, stop - 1]] - window + 1)
            distance = positions[start:stop, None] - positions[first:near]
            hidden.append((slice(0, near - first), distance >= window))
        count = np.arange(stop - start)
        hidden.append((slice(start - first, stop - first), count[:, None] < count))
        rows = (stop - start) * group
        heads = max(1, SCORES // (rows * (stop - first)))
        for head in range(0, n_kv, heads):
            some = slice(head, head + heads)
            mixed = _attend_block(
                queries[some, start:stop].reshape(-1, rows, head_dim),
                keys[some, first:stop],
                values[some, first:stop],
                hidden,
                softcap,
                bias.block(some, slice(first, stop)),
            )
            outputs[some, start:stop] = mixed.reshape(-1, stop - start, group, mixed.shape[-1])


def _attend_block(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    hidden: list[tuple[slice, NDArray[np.bool_]]],
    softcap: float | None,
    bias: HeadBias,
) -> Any:
    """One block: queries [heads, rows, d], keys [heads, n_keys, d], values [heads, n_keys, d_v].

    hidden: keys, and where queries do not see them, true in [n_queries, some keys]
    """
    scores = queries @ keys.transpose(0, 2, 1)
    cap(scores, softcap)
    heads, rows, n_keys = scores.shape
    n_queries = len(hidden[-1][1])
    by_query = scores.reshape(heads, n_queries, rows // n_queries, n_keys)
    if bias.keys is not None:
        by_query += bias.keys[:, None]
    for some, where in hidden:
        np.copyto(by_query[..., some], np.float32(-np.inf), where=where[:, None, :])
    most = scores.max(axis=-1, keepdims=True)
    if bias.sinks is not None:
        sinks = np.tile(bias.sinks, (1, n_queries, 1))
        np.maximum(most, sinks, out=most)
    scores -= most
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    if bias.sinks is not None:
        total += np.exp(sinks - most)
    mixed = scores @ values
    mixed /= total
    return mixed


def alibi_slopes(n_heads: int) -> FloatArray:
    """ALiBi's factor of each head, float32 [n_heads] (Press et al., arXiv 2108.12409): the powers
    of 2^(−8/n) for n heads; where n is no power of two, those of the next lower power, then every
    second one of the next higher."""
    below = 1 << (n_heads.bit_length() - 1)
    numbers = np.concatenate(
        (np.arange(1, below + 1) / below, np.arange(1, below * 2, 2) / below / 2)
    )
    return np.exp2(-8 * numbers[:n_heads]).astype(np.float32)
