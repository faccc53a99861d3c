"""Causal attention over sequences packed one after the other, without padding.

Queries go in blocks: a block's scores fill a megabyte or two, so that the passes of the softmax
run in cache; keys that a block cannot see, later than it or behind its window, are not touched.
The query heads that share a key head are rows of one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
            packing.positions[own],
            window,
            softcap,
        )
    return outputs.reshape(n_tokens, n_heads * head_dim)


def _attend_sequence(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    outputs: FloatArray,
    positions: NDArray[np.int64],
    window: int | None,
    softcap: float | None,
) -> None:
    """Fills `outputs` [n_kv, n, group, head_dim] (any strides) for one sequence.

    queries: [n_kv, n, group, head_dim], scaled; keys, values: [n_kv, n, head_dim]; positions: [n]
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
            )
            outputs[some, start:stop] = mixed.reshape(-1, stop - start, group, head_dim)


def _attend_block(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    hidden: list[tuple[slice, NDArray[np.bool_]]],
    softcap: float | None,
) -> Any:
    """One block: queries [heads, rows, d], keys and values [heads, n_keys, d].

    hidden: keys, and where queries do not see them, true in [n_queries, some keys]
    """
    scores = queries @ keys.transpose(0, 2, 1)
    cap(scores, softcap)
    heads, rows, n_keys = scores.shape
    for some, where in hidden:
        part = scores.reshape(heads, len(where), rows // len(where), n_keys)[..., some]
        np.copyto(part, np.float32(-np.inf), where=where[:, None, :])
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    mixed = scores @ values
    mixed /= total
    return mixed
