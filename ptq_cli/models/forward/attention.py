"""Causal attention over sequences packed one after the other, without padding.

Queries go in blocks: a block's scores fill a megabyte or two, so that the passes of the softmax
run in cache; keys that a block cannot see, later than it or behind its window, are not touched.
The query heads that share a key head are rows of one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.forward.layers import cap

QUERY_ROWS = 256  # rows (queries × heads that share a key head) of a block of scores
SCORES = 1 << 18  # values of a block of scores, at most, where one head does not need more


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
    def length(self) -> int:
        return int(self.mask.shape[1])

    @property
    def n_tokens(self) -> int:
        return self.starts[-1]

    def flat(self, batch: Array) -> Array:
        """The rows of `batch` [n_sequences, length, …] that are tokens: [n_tokens, …]."""
        packed: Array = batch[self.mask]
        return packed


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
) -> FloatArray:
    """`softmax(scale · queries · keysᵀ) · values`, each token seeing itself and earlier ones.

    queries: float32 [n_tokens, n_heads, head_dim]
    keys, values: float32 [n_tokens, n_kv_heads, head_dim]
    window: tokens that a token sees, itself included; None is all
    softcap: scores become `softcap · tanh(scores / softcap)`
    Returns float32 [n_tokens, n_heads · head_dim].
    """
    n_tokens, n_heads, head_dim = queries.shape
    n_kv = keys.shape[1]
    group = n_heads // n_kv
    outputs = np.empty((n_tokens, n_kv, group, head_dim), dtype=np.float32)
    by_head = outputs.transpose(1, 0, 2, 3)
    turned = np.empty((n_kv, n_tokens, group, head_dim), dtype=np.float32)
    grouped = queries.reshape(n_tokens, n_kv, group, head_dim).transpose(1, 0, 2, 3)
    np.multiply(grouped, np.float32(scale), out=turned)
    turned_keys = np.ascontiguousarray(keys.transpose(1, 0, 2))
    turned_values = np.ascontiguousarray(values.transpose(1, 0, 2))
    for start, stop in zip(packing.starts, packing.starts[1:], strict=False):
        own = slice(start, stop)
        _attend_sequence(
            turned[:, own],
            turned_keys[:, own],
            turned_values[:, own],
            by_head[:, own],
            _Mask(packing.positions[own], window, softcap),
        )
    return outputs.reshape(n_tokens, n_heads * head_dim)


@dataclass(frozen=True)
class _Mask:
    """What the queries of one sequence see, and the cap of their scores."""

    positions: NDArray[np.int64]
    window: int | None
    softcap: float | None

    def first(self, query: int) -> int:
        """The first key that `query` sees."""
        if self.window is None:
            return 0
        return int(np.searchsorted(self.positions, self.positions[query] - self.window + 1))

    def hidden(self, start: int, stop: int) -> list[tuple[int, int, NDArray[np.bool_]]]:
        """(key, key, true where hidden) for the keys that some of the queries do not see."""
        count = np.arange(stop - start)
        parts = [(start, stop, count[:, None] < count)]
        far = self.first(stop - 1)
        near = self.first(start)
        if self.window is not None and far > near:
            distance = self.positions[start:stop, None] - self.positions[near:far]
            parts.append((near, far, distance >= self.window))
        return parts


def _attend_sequence(
    queries: FloatArray, keys: FloatArray, values: FloatArray, outputs: FloatArray, mask: _Mask
) -> None:
    """Fills `outputs` [n_kv, n, group, head_dim] (any strides) for one sequence.

    queries: [n_kv, n, group, head_dim], scaled; keys, values: [n_kv, n, head_dim].
    """
    n_kv, n, group, head_dim = queries.shape
    step = max(1, QUERY_ROWS // group)
    for start in range(0, n, step):
        stop = min(start + step, n)
        first, hidden = mask.first(start), mask.hidden(start, stop)
        rows = (stop - start) * group
        heads = max(1, SCORES // (rows * (stop - first)))
        for head in range(0, n_kv, heads):
            some = slice(head, head + heads)
            mixed = _attend_block(
                queries[some, start:stop].reshape(-1, rows, head_dim),
                keys[some, first:stop],
                values[some, first:stop],
                [(low - first, high - first, where) for low, high, where in hidden],
                mask.softcap,
            )
            outputs[some, start:stop] = mixed.reshape(-1, stop - start, group, head_dim)


def _attend_block(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    hidden: list[tuple[int, int, NDArray[np.bool_]]],
    softcap: float | None,
) -> Any:
    """One block: queries [heads, rows, d], keys and values [heads, n_keys, d]."""
    scores = queries @ keys.transpose(0, 2, 1)
    cap(scores, softcap)
    heads, rows, n_keys = scores.shape
    for low, high, where in hidden:
        part = scores.reshape(heads, len(where), rows // len(where), n_keys)[..., low:high]
        np.copyto(part, np.float32(-np.inf), where=where[:, None, :])
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    mixed = scores @ values
    mixed /= total
    return mixed
