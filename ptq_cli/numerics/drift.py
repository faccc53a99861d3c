"""The drift of a linear's inputs, and the weight that makes up for it.

Where the layers before a linear are rounded already, it sees `inputs_q` in place of the float
model's `inputs_fp`. The weight whose outputs on `inputs_q` come nearest to the float outputs, held
to the weight by λ,

    min |weight · inputs_fpᵀ − weight* · inputs_qᵀ|² / n + λ |weight* − weight|²,

is `weight* = weight · (C + λI) · (H_q + λI)⁻¹` with `C = inputs_fpᵀ · inputs_q / n` (GPTAQ, arXiv
2504.02692; Qronos, arXiv 2505.11695), so that

    weight* − weight = weight · drift · (H_q + λI)⁻¹,   drift = C − H_q.

`drift` is summed as `(inputs_fp − inputs_q)ᵀ · inputs_q / n`: where nothing has drifted it is
exactly zero, and nothing cancels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import FloatArray
from ptq_cli.numerics.gptq import Feedback
from ptq_cli.numerics.ldl import solve_right


def corrected(
    weight: FloatArray, drift: FloatArray, feedback: Feedback, strength: float
) -> FloatArray:
    """`weight + strength · (weight* − weight)`, [out_features, in_features].

    drift: [in_features, in_features]; feedback: holds `H_q + λI`, factored
    """
    result: FloatArray = weight @ drift.astype(weight.dtype, copy=False)
    solve_right(result, feedback.upper, feedback.pivots, feedback.order)
    result *= weight.dtype.type(strength)
    result += weight
    return result


def drift_memory(in_features: int, n_tokens: int) -> int:
    """Bytes that a sum takes at most, with pairs of inputs of at most `n_tokens` at a time."""
    return 4 * in_features * (2 * in_features + 5 * n_tokens)


class DriftSum:
    """Sums `drift` over pairs of inputs of one site; every pair of rows is the same token.

    Tokens that the site's statistics hold out are left out here by the same rule, and kept.
    """

    def __init__(self, in_features: int, every: int, limit: int) -> None:
        self.matrix = np.zeros((in_features, in_features), np.float32)
        self.every, self.room = every, limit
        self.n_seen = self.n_tokens = 0
        self._heldout: list[NDArray[np.float32]] = []

    def update(self, exact: NDArray[np.float32], inputs: NDArray[np.float32]) -> None:
        """exact, inputs: [n, in_features], of the float model and of the one being rounded."""
        token = np.arange(self.n_seen, self.n_seen + len(inputs))
        self.n_seen += len(inputs)
        if self.every > 0 and self.room > 0:
            chosen = np.flatnonzero(token % self.every == self.every - 1)[: self.room]
            self.room -= len(chosen)
            self._heldout.append(exact[chosen])
            exact, inputs = (np.delete(a, chosen, axis=0) for a in (exact, inputs))
        self.n_tokens += len(inputs)
        self.matrix += (exact - inputs).T @ inputs

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(drift, the float model's inputs at the held-out tokens). The sum is used up."""
        self.matrix /= np.float32(max(1, self.n_tokens))
        empty = np.zeros((0, len(self.matrix)), np.float32)
        return self.matrix, np.concatenate([empty, *self._heldout])
