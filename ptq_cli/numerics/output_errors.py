"""How far a rounded weight is from the weight: on the Hessian, on held-out inputs, and plainly.

With `E = weight − dequantized`:

    loss     tr(E · H · Eᵀ), the mean squared change of the linear's output, summed over outputs
    rel_err  loss / tr(weight · H · weightᵀ)
    sqnr_db  −10 log10(|E|² / |weight|²), of the weight alone

tr(E H Eᵀ) is taken as ⟨H, Eᵀ E⟩: the symmetric product Eᵀ E costs half of E · H. Without
calibration H is the identity.

Where layers before this one are rounded too, the held-out inputs come in pairs, the float model's
x_fp and what the rounded layers make of it, x; then

    heldout_rel_err  Σ |weight · x_fp − dequantized · x|² / Σ |weight · x_fp|²,

the drift of the inputs included, while `loss` and `rel_err` are those of the weight alone, at x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, log10

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.report import OutputErrors
from ptq_cli.core.tensors import Array, FloatArray
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.numerics.parallel import each, pieces

ROWS_AT_ONCE = 1024
PANEL_ELEMENTS = 1 << 19  # weights whose codes stay in the cache
STRIP_ROWS = 256
BLOCK_COLUMNS = 1024  # of ⟨H, Eᵀ E⟩, computed at a time


Piece = tuple[NDArray[np.float32], NDArray[np.float32]]  # a few rows of a weight and of its error


@dataclass(frozen=True)
class Measures:
    """Errors of one rounded weight; `heldout_rel_err` is None where nothing was held out."""

    loss: float
    rel_err: float
    heldout_rel_err: float | None
    sqnr_db: float | None
    max_abs_err: float


def measure(
    weight: FloatArray,
    rounded: QuantizedWeight,
    hessian: NDArray[np.float32] | None,
    heldout: Array | None,
    outputs: FloatArray | None = None,
    heldout_float: Array | None = None,
) -> Measures:
    """Measure one rounded weight.

    weight: [out_features, in_features]
    hessian: [in_features, in_features], or None for the identity
    heldout: [n, in_features], or None
    outputs: [out_features], what the outputs are multiplied by before they are looked at, or None
    heldout_float: x_fp, of the shape of `heldout`, or None where nothing has drifted
    """

    def pieces_of(panel: slice) -> Iterator[Piece]:
        for rows in pieces(panel.start, panel.stop, weight.shape[1]):
            original = weight[rows].astype(np.float32, copy=False)
            yield original, original - rounded.dequantized(rows)

    return measure_rows(weight.shape, pieces_of, hessian, heldout, outputs, heldout_float)


def measure_rows(
    shape: tuple[int, ...],
    pieces_of: Callable[[slice], Iterator[Piece]],
    hessian: NDArray[np.float32] | None,
    heldout: Array | None,
    outputs: FloatArray | None = None,
    heldout_float: Array | None = None,
) -> Measures:
    """The same, for anything that gives the weight and its error.

    pieces_of: a few rows of both at a time, in order, of the rows it is asked for. Each row is
        asked for once, on any thread; a piece may be overwritten once the next is asked for
    """
    sums = _Sums(hessian, heldout, outputs, heldout_float)
    for top in range(0, shape[0], ROWS_AT_ONCE):
        stop = min(top + ROWS_AT_ONCE, shape[0])
        kept = np.empty((2, stop - top if sums.has_products else 0, shape[1]), np.float32)
        sums.add(top, pieces(top, stop, shape[1], PANEL_ELEMENTS), pieces_of, kept)
    return sums.result()


class _Sums:
    """Sums over rows of the weight and of its error."""

    def __init__(
        self,
        hessian: NDArray[np.float32] | None,
        heldout: Array | None,
        outputs: FloatArray | None,
        heldout_float: Array | None,
    ) -> None:
        self.hessian = hessian
        self.outputs = outputs
        self.heldout = _columns(heldout)
        self.drifted = None if heldout_float is None else _columns(heldout_float)
        self.error = self.power = self.loss = self.energy = 0.0
        self.heldout_loss = self.heldout_energy = self.largest = 0.0

    @property
    def has_products(self) -> bool:
        return self.hessian is not None or self.heldout is not None

    def add(
        self,
        top: int,
        panels: Sequence[slice],
        pieces_of: Callable[[slice], Iterator[Piece]],
        kept: NDArray[np.float32],
    ) -> None:
        """Take in rows from `top` on; `kept` has room for weight and error where products need
        them whole."""

        products = self.has_products

        def work(panel: slice) -> tuple[float, float, float]:
            lost = power = largest = 0.0
            start = panel.start
            # What is not finite shows in the scales, and what overflows in the sums.
            with np.errstate(over="ignore", invalid="ignore"):
                for weight, error in pieces_of(panel):
                    rows = slice(start, start + len(weight))
                    start = rows.stop
                    if self.outputs is not None:
                        scale = self.outputs[rows, None].astype(np.float32)
                        weight, error = weight * scale, error * scale
                    if products:
                        place = slice(rows.start - top, rows.stop - top)
                        kept[0, place], kept[1, place] = weight, error
                    lost += _square(error)
                    power += _square(weight)
                    if error.size:
                        high = np.maximum.reduce(error, axis=None)
                        low = np.minimum.reduce(error, axis=None)
                        largest = max(largest, float(high), -float(low))
            return lost, power, largest

        for error, power, largest in each(work, panels):
            self.error += error
            self.power += power
            self.largest = max(self.largest, largest)
        if self.has_products and kept.size:
            self._add_products(*kept)

    @np.errstate(over="ignore", invalid="ignore")
    def _add_products(self, weight: NDArray[np.float32], error: NDArray[np.float32]) -> None:
        if self.hessian is not None:
            self.loss += _trace(self.hessian, error)
            self.energy += _trace(self.hessian, weight)
        if self.heldout is not None:
            heldout, drifted = self.heldout, self.drifted
            wanted = heldout if drifted is None else drifted

            def lost(rows: slice) -> float:
                outputs = error[rows] @ heldout
                if drifted is not None:
                    outputs += weight[rows] @ (drifted - heldout)
                return _square(outputs)

            strips = [slice(top, top + STRIP_ROWS) for top in range(0, len(weight), STRIP_ROWS)]
            self.heldout_loss += sum(each(lost, strips))
            self.heldout_energy += sum(each(lambda rows: _square(weight[rows] @ wanted), strips))

    def result(self) -> Measures:
        loss = self.error if self.hessian is None else max(0.0, self.loss)
        energy = self.power if self.hessian is None else self.energy
        sums = (self.loss, energy, self.error, self.power, self.heldout_loss, self.heldout_energy)
        if not all(map(isfinite, sums)):
            raise InputError(
                "its values are too large: their squares do not fit float32",
                hint="leave it out with --ignore",
            )
        return Measures(
            loss=loss,
            rel_err=_ratio(loss, energy),
            heldout_rel_err=(
                _ratio(self.heldout_loss, self.heldout_energy) if self.heldout is not None else None
            ),
            sqnr_db=-10 * log10(self.error / self.power) if self.error and self.power else None,
            max_abs_err=self.largest,
        )


def _columns(inputs: Array | None) -> NDArray[np.float32] | None:
    """Held-out inputs as [in_features, n], None where there are none."""
    return None if inputs is None or len(inputs) == 0 else inputs.astype(np.float32).T


def _trace(hessian: NDArray[np.float32], rows: NDArray[np.float32]) -> float:
    """tr(rows · H · rowsᵀ) as ⟨H, rowsᵀ rows⟩, of which only the lower triangle is computed."""

    def block(start: int) -> float:
        columns = slice(start, start + BLOCK_COLUMNS)
        left = rows[:, columns].T
        total = float(np.vdot(hessian[columns, columns], left @ left.T))
        if start:
            total += 2 * float(np.vdot(hessian[columns, :start], left @ rows[:, :start]))
        return total

    # The last blocks are the longest, so they come first.
    return sum(each(block, reversed(range(0, len(hessian), BLOCK_COLUMNS))))


def _square(values: NDArray[np.float32]) -> float:
    """Σ values²: BLAS in float32 over a row, float64 over rows."""
    return float(np.add.reduce(np.vecdot(values, values), axis=None, dtype=np.float64))


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
        sqnr_db=-10 * log10(change / power) if change and power else None,
    )
