"""The drift of a linear's inputs and of the residual stream, and the weight that makes up for both.

Where the layers before a linear are rounded already, it sees `inputs` in place of the float model's
`inputs_fp`, and what its outputs are added to is `stream` in place of `stream_fp`. The weight that
brings the stream behind the addition nearest to the float model's, held to the weight by λ,

    min |stream_fp − stream + weight · inputs_fpᵀ − weight* · inputsᵀ|² / n + λ |weight* − weight|²,

is `weight* = weight + change` with

    change = (weight · D + R) · (H + λI)⁻¹,
    D = (inputs_fp − inputs)ᵀ · inputs / n,   R = (stream_fp − stream)ᵀ · inputs / n.

A linear whose outputs are not added to the stream as they are has R = 0: its own outputs come
nearest to the float model's (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). For one whose
outputs are, `weight · D + R` is summed as it stands: what the stream lacks has fewer columns than
the inputs of a down_proj. Differences are summed, not products of each model: where nothing has
drifted they are exactly zero.

On few tokens the change is fitted to them, too. Held-out tokens say how much of it holds: with
`given` what the change adds to the outputs there and `needed` what they lack,

    strength = clip(Σ⟨needed, given⟩ / Σ⟨given, given⟩, 0, 1)

is the part of the change that comes nearest to what is needed.
"""

from __future__ import annotations

from math import isfinite

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.statistics import Drift
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.errors import NumericalError
from ptq_cli.numerics.feedback import Feedback
from ptq_cli.numerics.ldl import solve_right
from ptq_cli.numerics.output_errors import inner
from ptq_cli.numerics.parallel import each, equal_strips, strips

ROWS_AT_ONCE = 256
STRIP = 512  # tokens of what is lacking that are one piece of work
COLUMNS = 384  # of it, at most, that are another
STREAM_DAMP = 0.2  # of the mean energy of a channel, where a map of the stream is fitted
PACKED = 4 << 20  # bytes that products pack what they multiply into
UNPROVEN_STRENGTH = 0.75  # where no token is held out


def solved_drift(drift: Drift, feedback: Feedback) -> FloatArray:
    """`D (H + λI)⁻¹`, which all linears of a site share; or `(weight · D + R)(H + λI)⁻¹` of the one
    that adds to the stream. In the dtype of the feedback.

    feedback: holds `H + λI`, factored
    """
    total = drift.inputs if drift.outputs is None else drift.outputs
    solved: FloatArray = np.array(total, feedback.hessian.dtype)
    solve_right(solved, feedback.upper, feedback.pivots, feedback.order)
    return solved


def correction(weight: FloatArray, drift: Drift, solved: FloatArray) -> FloatArray:
    """`change`, [out_features, in_features], in the weight's dtype. solved: by `solved_drift`"""
    change: FloatArray = weight @ solved if drift.outputs is None else solved.copy()
    return change


def proven_strength(weight: FloatArray, change: FloatArray, drift: Drift, heldout: Array) -> float:
    """The strength that held-out tokens ask for; UNPROVEN_STRENGTH where there are none.

    heldout: the site's inputs at those tokens, [n, in_features]

    Raises:
        NumericalError: it is not finite.
    """
    if len(heldout) == 0:
        return UNPROVEN_STRENGTH
    seen = heldout.astype(np.float32, copy=False)
    drifted = drift.heldout - seen

    def products(rows: slice) -> tuple[float, float]:
        given = change[rows].astype(np.float32, copy=False) @ seen.T
        needed = weight[rows].astype(np.float32, copy=False) @ drifted.T
        if drift.heldout_stream is not None:
            needed += drift.heldout_stream[:, rows].T
        return inner(needed, given), inner(given, given)

    with np.errstate(over="ignore", invalid="ignore"):
        sums = each(products, strips(len(weight), ROWS_AT_ONCE))
    fits, power = (sum(side) for side in zip(*sums, strict=True))
    if not (isfinite(fits) and isfinite(power)):
        raise NumericalError("the strength of its correction for drift is not finite")
    return _strength(fits, power)


def _strength(fits: float, power: float) -> float:
    return min(1.0, max(0.0, fits / power)) if power > 0 else 0.0


def drift_memory(in_features: int, hidden_size: int, n_tokens: int) -> int:
    """Bytes that a sum takes at most, with pairs of inputs of at most `n_tokens` at a time, which
    are not counted (but where the float model's are divided before: the quotients are).

    hidden_size: of the stream that outputs are added to; 0 where they are not. Their weight is
        counted as it is read and as float32
    """
    sums = 2 * (hidden_size or in_features) + 2 * hidden_size
    return 4 * (sums * in_features + 2 * n_tokens * (in_features + hidden_size)) + PACKED


class DriftSum:
    """Sums the drift over pairs of inputs of one site; every pair of rows is the same token.

    weight: [hidden_size, in_features], of the site's linear where its outputs are added to the
        stream as they are; else None
    whole: the sum is wanted; else the held-out tokens are kept, and nothing is summed
    """

    def __init__(
        self, in_features: int, weight: NDArray[np.float32] | None = None, *, whole: bool = True
    ) -> None:
        width = in_features if weight is None else len(weight)
        self.weight, self.n_tokens = weight, 0
        self._sum = np.zeros((width, in_features), np.float32) if whole else None
        self._heldout: list[NDArray[np.float32]] = []
        self._heldout_stream: list[NDArray[np.float32]] = []

    def update(
        self,
        exact: NDArray[np.float32],
        inputs: NDArray[np.float32],
        held: NDArray[np.bool_],
        stream: NDArray[np.float32] | None = None,
    ) -> None:
        """Take in the next tokens.

        exact, inputs: [n, in_features], of the float model and of the one being rounded
        held: [n], the tokens that are held out: they are left out of the sums, and kept
        stream: `stream_fp − stream`, [n, hidden_size], beside a weight; without sums, where outputs
            are added to it
        """
        self._heldout.append(exact[held])
        if stream is not None:
            self._heldout_stream.append(stream[held])
        if self._sum is not None:
            self.n_tokens += int((~held).sum())
            lacking = self._lacking(exact, inputs, stream)
            lacking[held] = 0
            _add_product(self._sum, lacking, inputs)

    def _lacking(
        self,
        exact: NDArray[np.float32],
        inputs: NDArray[np.float32],
        stream: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        """Of each token, what is summed: [n, in_features], or beside a weight [n, hidden_size]."""
        weight = self.weight
        lacking = np.empty_like(exact if stream is None else stream)

        def fill(rows: slice) -> None:
            own = exact[rows] - inputs[rows]
            if weight is not None and stream is not None:
                own = own @ weight.T
                own += stream[rows]
            lacking[rows] = own

        each(fill, strips(len(lacking), STRIP))
        return lacking

    def result(self) -> Drift:
        """The drift so far. The sum is used up."""
        heldout = np.concatenate(self._heldout)
        stream = np.concatenate(self._heldout_stream) if self._heldout_stream else None
        if self._sum is None:
            return Drift(None, heldout, None, stream)
        self._sum /= np.float32(max(1, self.n_tokens))
        if self.weight is None:
            return Drift(self._sum, heldout)
        return Drift(None, heldout, self._sum, stream)


def _add_product(
    total: NDArray[np.float32], lacking: NDArray[np.float32], inputs: NDArray[np.float32]
) -> None:
    """Add `lackingᵀ · inputs`."""

    def add(columns: slice) -> None:
        total[columns] += lacking[:, columns].T @ inputs

    each(add, equal_strips(lacking.shape[1], COLUMNS))


def corrected_stream(stream: FloatArray, stream_fp: FloatArray) -> FloatArray:
    """What the layers that are rounded later leave of a drift of the stream, before they are: the
    change of each is a linear map of the stream, but for its norm.

    stream, stream_fp: [n_tokens, width], of the rounded and of the float model

    With tokens, and then channels, scaled to the same energy (or a few loud channels would be all
    that is fitted, at the cost of the others, and later norms make little of them), x of the stream
    and d of what it lacks, the map fitted on every second token says of another token with y what
    is made up for:

    `y · (xᵀx + λI)⁻¹ · xᵀd = y · xᵀ · (x xᵀ + λI)⁻¹ · d`

    (the latter is smaller where tokens are few). That is taken at the strength (above) that it has
    proven. A stream without tokens, or one that is not finite, stays as it is.
    """
    if not stream.size or not (np.isfinite(stream).all() and np.isfinite(stream_fp).all()):
        return stream
    scale = _root_mean_square(stream_fp, axis=1)
    scale = scale * _root_mean_square(stream_fp / scale, axis=0)
    inputs, needed = stream / scale, (stream_fp - stream) / scale
    given = np.zeros_like(needed)
    for first in (0, 1):
        known, other = slice(first, None, 2), slice(1 - first, None, 2)
        gram = inputs[known] @ inputs[known].T
        damp = STREAM_DAMP * np.trace(gram) / inputs.shape[1]
        gram[np.diag_indices_from(gram)] += damp if damp > 0 else 1
        given[other] = inputs[other] @ inputs[known].T @ np.linalg.solve(gram, needed[known])
    strength = _strength(float(np.vdot(needed, given)), float(np.vdot(given, given)))
    corrected: FloatArray = stream + stream.dtype.type(strength) * scale * given
    return corrected


def _root_mean_square(values: FloatArray, axis: int) -> FloatArray:
    """Along an axis that stays, of length 1; 1 where all is zero."""
    found: FloatArray = np.sqrt(np.mean(np.square(values), axis=axis, keepdims=True))
    found[found == 0] = 1
    return found
