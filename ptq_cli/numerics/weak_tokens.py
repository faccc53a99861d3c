"""Tokens that say little: a model run on them sees the same again and again."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

MOST = 0.5  # of the tokens that may be one and the same, of the passages that may be repetitions
FEW = 0.1  # of the sequences may be repetitions
PASSAGE = 8  # tokens

Ids: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]


def repeated_sequences(ids: Ids, mask: Mask) -> int:
    """How many sequences are equal to an earlier one where they are not padding."""
    shown = np.where(mask, ids, -1)[mask.any(axis=1)]
    return len(shown) - len(np.unique(shown, axis=0))


def weak_tokens(ids: Ids, mask: Mask) -> tuple[str, ...]:
    """What is wrong with sequences of tokens, in words; empty where nothing is.

    ids: [n, length]; mask: [n, length], false at padding, of which some are true
    """
    reasons = []
    found, times = np.unique(ids[mask], return_counts=True)
    share = times.max() / times.sum()
    if share > MOST:
        reasons.append(
            f"token {found[times.argmax()]} makes up {100 * share:.0f} % of the {times.sum()}"
            " tokens (where that is padding, give a --mask)"
        )
    repeated = repeated_sequences(ids, mask)
    if repeated > FEW * len(ids):
        reasons.append(f"{repeated} of {len(ids)} sequences repeat an earlier one")
    share = 0.0 if reasons else _repeated_passages(ids, mask)
    if share > MOST:
        reasons.append(f"{100 * share:.0f} % of passages of {PASSAGE} tokens repeat an earlier one")
    return tuple(reasons)


def _repeated_passages(ids: Ids, mask: Mask) -> float:
    """The share of the passages without padding that stand somewhere before, too."""
    count = ids.shape[1] - PASSAGE + 1
    if count < PASSAGE:
        return 0.0
    hashes, whole = np.zeros((len(ids), count), np.uint64), np.ones((len(ids), count), np.bool_)
    for place in range(PASSAGE):
        part = slice(place, place + count)
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[:, part].astype(np.uint64)
        whole &= mask[:, part]
    passages = hashes[whole]
    return 1 - len(np.unique(passages)) / len(passages) if len(passages) else 0.0
