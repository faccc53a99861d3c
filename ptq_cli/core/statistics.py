"""What calibration knows of the inputs of a site."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import Array


@dataclass(frozen=True)
class SiteInfo:
    """What is known of a site before its statistics are read or made. own_tokens: as there"""

    site: str
    linears: tuple[str, ...]
    in_features: int
    n_tokens: int
    own_tokens: int | None = None


@dataclass(frozen=True)
class Distribution:
    """How the values of a site's inputs are distributed, all channels together.

    histogram: int64 counts of |value| in bins of 1/128 octave, the first of which is bin `start`
        (numerics/distribution.py states the bins)
    """

    minimum: float
    maximum: float
    mean: float
    std: float
    histogram: NDArray[np.int64]
    start: int

    @property
    def absmax(self) -> float:
        return max(-self.minimum, self.maximum)


@dataclass(frozen=True)
class Drift:
    """How far a site's inputs, and the residual stream that its outputs are added to, are from the
    float model's, where layers before it are rounded (numerics/drift.py).

    inputs: float32 [in_features, in_features], `(inputs_fp - inputs).T @ inputs / n_tokens`; None
        where `outputs` is known, or where nothing makes up for the drift
    heldout: inputs_fp at the held-out tokens, float32 [n, in_features]
    outputs: of a linear whose outputs are added to the stream as they are, what the stream lacks
        behind the addition, float32 [hidden_size, in_features]:
        `(stream_fp - stream + (inputs_fp - inputs) @ weight.T).T @ inputs / n_tokens`; else None
    heldout_stream: `stream_fp - stream` just before the addition at the held-out tokens, float32
        [n, hidden_size], or None
    """

    inputs: NDArray[np.float32] | None
    heldout: NDArray[np.float32]
    outputs: NDArray[np.float32] | None = None
    heldout_stream: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Coupling:
    """How the rows of weights whose outputs are added to the residual stream make up for one
    another (numerics/coupling.py).

    order: row visited k-th, int [hidden_size]; stops: where each level of rows ends in that order
    upper: U, float32 [hidden_size, hidden_size], in that order
    """

    order: NDArray[np.intp]
    stops: tuple[int, ...]
    upper: NDArray[np.float32]


@dataclass(frozen=True)
class SiteStatistics:
    """What calibration knows of the inputs of one site (of every linear that shares them).

    hessian: float32 [in_features, in_features], `inputs.T @ inputs / n_tokens`
    n_tokens: tokens behind every statistic here (held-out ones are in none)
    absmax, absmean: float32 [in_features], per channel
    heldout: inputs that the statistics have not seen, [n, in_features], in the dtype they came in
    sample: evenly spaced tokens that the statistics have seen, for searches that need inputs
        themselves, [n, in_features]
    n_seen: tokens read, held-out ones included
    distribution: of all values, where it was asked for (no method reads it; files of statistics
        hold it), else None
    drift: where layers before the site are rounded and that is made up for, else None
    coupling: of the rows of the site's linears, where that is made use of, else None
    own_tokens: of an expert that too few tokens reach, how many, held-out ones aside; all else here
        is then of the tokens of all experts beside it. None: everything is the site's own
    """

    site: str
    linears: tuple[str, ...]
    hessian: NDArray[np.float32]
    n_tokens: int
    n_seen: int
    absmax: NDArray[np.float32]
    absmean: NDArray[np.float32]
    heldout: Array
    sample: Array
    distribution: Distribution | None = None
    drift: Drift | None = None
    coupling: Coupling | None = None
    own_tokens: int | None = None

    @property
    def in_features(self) -> int:
        return int(self.hessian.shape[0])
