"""How far a rounded weight is from the weight: on inputs it was calibrated on, on held-out inputs,
and plainly.

With `E = weight − dequantized`:

    loss     tr(E · H · Eᵀ), the mean squared change of the linear's output, summed over outputs
    rel_err  loss / tr(weight · H · weightᵀ)
    sqnr_db  −10 log10(|E|² / |weight|²), of the weight alone

A run takes H of a sample of the inputs: `Σ |E · x|² / n` over n of them costs n / in_features of
the exact one, which `ptq eval` computes, as ⟨H, Eᵀ E⟩: the symmetric product Eᵀ E costs half of
E · H. Without calibration H is the identity.

Where layers before this one are rounded too, the held-out inputs come in pairs, the float model's
x_fp and what the rounded layers make of it, x, and where the outputs are added to the residual
stream, so do the streams before that, which differ by ρ; then

    heldout_rel_err  Σ |ρ + weight · x_fp − dequantized · x|² / Σ |weight · x_fp|²,

the drift included: what the addition leaves wrong, as a part of the layer's outputs. (`loss` and
`rel_err` are those of the weight alone, at x.)

Where a layer's inputs are rounded when it runs (W8A8), `dequantized · Q(x)` is what it computes:
`error_with_rounded_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import isfinite, log10
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.report import OutputErrors
from ptq_cli.core.statistics import Drift
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.numerics.parallel import each, pieces, strips

ROWS_AT_ONCE = 1024
PANEL_ELEMENTS = 1 << 19  # weights whose codes stay in the cache
STRIP_ROWS = 256
BLOCK_COLUMNS = 1024  # of ⟨H, Eᵀ E⟩, computed at a time


class Rows(Protocol):
    """A weight [out_features, in_features] whose rows are float32: an array, or something that
    reads like one (`rows[:]` is all of it)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice) -> NDArray[np.float32]: ...


Piece = tuple[NDArray[np.float32], NDArray[np.float32]]  # a few rows of a weight and of its error


@dataclass(frozen=True)
class Inputs:
    """What errors are measured on; nothing at all is the weight alone.

    hessian: float32 [in_features, in_features], or None for the identity
    sample: inputs that were calibrated on, [n, in_features], in place of the Hessian, or None
    heldout: inputs that were not, [n, in_features], or None
    drift: of the held-out inputs, or None where nothing has drifted
    """

    hessian: NDArray[np.float32] | None = None
    sample: Array | None = None
    heldout: Array | None = None
    drift: Drift | None = None


@dataclass(frozen=True)
class Energy:
    """Of the weight's outputs: what errors are a part of. Another rounding of the same weight that
    is measured on the same inputs takes it over."""

    seen: float
    heldout: float


@dataclass(frozen=True)
class Measures:
    """Errors of one rounded weight; `heldout_rel_err` is None where nothing was held out.

    energy: of the weight's outputs
    weight_rel_err: where `rel_err` and `heldout_rel_err` are those of the outputs with rounded
        inputs, the error that counts of the weight alone; else None
    """

    loss: float
    rel_err: float
    heldout_rel_err: float | None
    sqnr_db: float | None
    max_abs_err: float
    energy: Energy
    weight_rel_err: float | None = None

    @property
    def error(self) -> float:
        """The error that counts: on held-out inputs where there are any."""
        return self.rel_err if self.heldout_rel_err is None else self.heldout_rel_err


def measure(
    weight: FloatArray,
    rounded: QuantizedWeight,
    inputs: Inputs = Inputs(),
    outputs: FloatArray | None = None,
    energy: Energy | None = None,
) -> Measures:
    """Measure one rounded weight.

    weight: [out_features, in_features]
    outputs: [out_features], what the outputs are multiplied by before they are looked at, or None
    energy: where it is known from another rounding
    """

    def pieces_of(panel: slice) -> Iterator[Piece]:
        for rows in pieces(panel.start, panel.stop, weight.shape[1]):
            original = weight[rows].astype(np.float32, copy=False)
            yield original, original - rounded.dequantized(rows)

    return measure_rows(weight.shape, pieces_of, inputs, outputs, energy)


@np.errstate(over="ignore", invalid="ignore")  # what overflows shows in the sums
def measure_rows(
    shape: tuple[int, ...],
    pieces_of: Callable[[slice], Iterator[Piece]],
    inputs: Inputs = Inputs(),
    outputs: FloatArray | None = None,
    energy: Energy | None = None,
) -> Measures:
    """The same, for anything that gives the weight and its error.

    pieces_of: a few rows of both at a time, in order, of the rows it is asked for. Each row is
        asked for once, on any thread; a piece may be overwritten once the next is asked for
    """
    sample, heldout, hessian = _columns(inputs.sample), _Heldout.of(inputs), inputs.hessian
    # products need many rows at once
    whole = not (hessian is None and sample is None and heldout is None)
    error = power = largest = loss = seen = heldout_loss = heldout_seen = 0.0
    for rows in strips(shape[0], ROWS_AT_ONCE):
        kept = np.empty((2, rows.stop - rows.start, shape[1]), np.float32) if whole else None
        work = partial(_measure_panel, pieces_of, outputs, kept, rows.start)
        panels = pieces(rows.start, rows.stop, shape[1], PANEL_ELEMENTS)
        for lost, square, reach in each(work, panels):
            error += lost
            power += square
            largest = max(largest, reach)
        if kept is None:
            continue
        if sample is not None:
            loss += _output_squares(kept[1], sample) / sample.shape[1]
            seen += 0 if energy else _output_squares(kept[0], sample) / sample.shape[1]
        elif hessian is not None:
            loss += _trace(hessian, kept[1])
            seen += 0 if energy else _trace(hessian, kept[0])
        if heldout is not None:
            heldout_loss += heldout.squares(kept[0], kept[1], rows)
            heldout_seen += 0 if energy else _output_squares(kept[0], heldout.wanted)
    if hessian is None and sample is None:
        loss, seen = error, power
    energy = energy or Energy(seen, heldout_seen)
    sums = (loss, energy.seen, error, power, heldout_loss, energy.heldout)
    if not all(map(isfinite, sums)):
        raise InputError(
            "its values are too large: their squares do not fit float32",
            hint="leave it out with --ignore",
        )
    loss = max(0.0, loss)
    return Measures(
        loss=loss,
        rel_err=_ratio(loss, energy.seen),
        heldout_rel_err=None if heldout is None else _ratio(heldout_loss, energy.heldout),
        sqnr_db=_decibels(error, power),
        max_abs_err=largest,
        energy=energy,
    )


@np.errstate(over="ignore", invalid="ignore")  # what is not finite shows in the scales
def _measure_panel(
    pieces_of: Callable[[slice], Iterator[Piece]],
    outputs: FloatArray | None,
    kept: NDArray[np.float32] | None,
    top: int,
    panel: slice,
) -> tuple[float, float, float]:
    """Σ error², Σ weight² and max |error| of a few rows; `kept` receives weight and error, its
    first row is row `top`."""
    lost = power = largest = 0.0
    start = panel.start
    for weight, error in pieces_of(panel):
        rows = slice(start, start + len(weight))
        start = rows.stop
        if outputs is not None:
            scale = outputs[rows, None].astype(np.float32)
            weight, error = weight * scale, error * scale
        if kept is not None:
            place = slice(rows.start - top, rows.stop - top)
            kept[0, place], kept[1, place] = weight, error
        lost += _square(error)
        power += _square(weight)
        if error.size:
            high = np.maximum.reduce(error, axis=None)
            low = np.minimum.reduce(error, axis=None)
            largest = max(largest, float(high), -float(low))
    return lost, power, largest


@dataclass(frozen=True)
class _Heldout:
    """seen: x, [in_features, n]; wanted: x_fp, the same array where nothing has drifted; stream: ρ,
    [out_features, n], or None for 0"""

    seen: NDArray[np.float32]
    wanted: NDArray[np.float32]
    stream: NDArray[np.float32] | None

    @classmethod
    def of(cls, inputs: Inputs) -> _Heldout | None:
        seen = _columns(inputs.heldout)
        if seen is None:
            return None
        wanted = None if inputs.drift is None else _columns(inputs.drift.heldout)
        stream = None if inputs.drift is None else _columns(inputs.drift.heldout_stream)
        return cls(seen, seen if wanted is None else wanted, stream)

    def squares(
        self, weight: NDArray[np.float32], error: NDArray[np.float32], place: slice
    ) -> float:
        """`Σ |ρ + weight · x_fp − dequantized · x|²` of the rows at `place`."""
        stream = None if self.stream is None else self.stream[place]
        moved = None if self.wanted is self.seen else self.wanted - self.seen

        def lost(rows: slice) -> float:
            outputs = error[rows] @ self.seen
            if moved is not None:
                outputs += weight[rows] @ moved
            if stream is not None:
                outputs += stream[rows]
            return _square(outputs)

        return sum(each(lost, strips(len(weight), STRIP_ROWS)))


def _output_squares(rows: NDArray[np.float32], inputs: NDArray[np.float32]) -> float:
    """`Σ |row · x|²`. inputs: x, [in_features, n]"""
    return sum(each(lambda some: _square(rows[some] @ inputs), strips(len(rows), STRIP_ROWS)))


def _columns(inputs: Array | None) -> NDArray[np.float32] | None:
    """Inputs as [in_features, n], C-ordered, which products of few rows like better; None where
    there are none."""
    if inputs is None or len(inputs) == 0:
        return None
    return np.ascontiguousarray(inputs.T, np.float32)


def _trace(hessian: NDArray[np.float32], rows: NDArray[np.float32]) -> float:
    """tr(rows · H · rowsᵀ) as ⟨H, rowsᵀ rows⟩, of which only the lower triangle is computed."""

    def block(columns: slice) -> float:
        left, before = rows[:, columns].T, slice(0, columns.start)
        total = float(np.vdot(hessian[columns, columns], left @ left.T))
        if columns.start:
            total += 2 * float(np.vdot(hessian[columns, before], left @ rows[:, before]))
        return total

    # The last blocks are the longest, so they come first.
    return sum(each(block, reversed(strips(len(hessian), BLOCK_COLUMNS))))


def inner(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Σ a · b: BLAS in float32 over a row, float64 over rows."""
    return float(np.add.reduce(np.vecdot(a, b), axis=None, dtype=np.float64))


def _square(values: NDArray[np.float32]) -> float:
    return inner(values, values)


def _decibels(change: float, power: float) -> float | None:
    """−10 log10(change / power); None where one of them is nothing."""
    return -10 * log10(change / power) if change and power else None


def _ratio(part: float, whole: float) -> float:
    """part / whole; nothing lost of nothing is 0."""
    return part / whole if whole > 0 else 0.0


def output_errors(
    inputs: FloatArray,
    weight: FloatArray,
    outputs: NDArray[np.float32],
    scale: FloatArray | None = None,
) -> OutputErrors:
    """How far `outputs` [n, out_features] are from `inputs @ weight.T`.

    inputs: [n, in_features]; weight: [out_features, in_features]
    scale: [out_features], what both are multiplied by before they are compared, or None
    """
    exact = (inputs @ weight.T).astype(np.float32, copy=False)
    error = exact - outputs
    if scale is not None:
        exact, error = exact * scale.astype(np.float32), error * scale.astype(np.float32)
    change, power = _square(error), _square(exact)
    return OutputErrors(
        mae=float(np.abs(error).mean(dtype=np.float64)) if error.size else 0.0,
        rel_err=_ratio(change, power),
        sqnr_db=_decibels(change, power),
    )


def error_with_rounded_inputs(
    weight: Rows,
    rounded: QuantizedWeight,
    inputs: NDArray[np.float32],
    seen: NDArray[np.float32],
    outputs: FloatArray | None = None,
    stream: NDArray[np.float32] | None = None,
) -> float:
    """`Σ |ρ + weight · x_fp − dequantized · Q(x)|² / Σ |weight · x_fp|²`.

    weight: [out_features, in_features]
    inputs: x_fp, [n, in_features]; seen: Q(x), what the rounded inputs stand for, the same shape
    outputs: [out_features], what the outputs are multiplied by before they are looked at, or None
    stream: ρ, [n, out_features]; None: 0
    """

    def squares(rows: slice) -> tuple[float, float]:
        exact = weight[rows] @ inputs.T
        error = exact - rounded.dequantized(rows) @ seen.T
        if outputs is not None:
            scale = outputs[rows, None].astype(np.float32)
            exact, error = exact * scale, error * scale
        if stream is not None:
            error = error + stream[:, rows].T
        return _square(error), _square(exact)

    pairs = list(each(squares, strips(weight.shape[0], STRIP_ROWS)))
    lost, power = (float(sum(side)) for side in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    if not isfinite(lost + power):
        raise InputError(
            "its outputs are too large: their squares do not fit float32",
            hint="leave it out with --ignore",
        )
    return _ratio(lost, power)
