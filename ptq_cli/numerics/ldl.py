"""One factorization for GPTQ: `H = U · diag(D) · Uᵀ` with U unit upper triangular.

It is the Cholesky factorization of H flipped in both axes (QuIP, arXiv 2307.13304, shows that GPTQ
is rounding with this U as feedback), computed from the last column block to the first so that
nothing is flipped but the small diagonal blocks. Blocks keep the work in matrix products; numpy's
own `cholesky` of a large matrix is several times slower.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import NumericalError
from ptq_cli.numerics.parallel import each, strips

BLOCK = 128
ROWS_AT_ONCE = 1024


class NotPositiveDefinite(NumericalError):
    """The matrix has no such factorization."""

    def __init__(
        self,
        message: str = "a Hessian is not positive definite",
        *,
        hint: str | None = "raise the damping",
    ) -> None:
        super().__init__(message, hint=hint)


@np.errstate(invalid="ignore", over="ignore")  # what is not finite shows in the pivots
def ldl_upper(
    matrix: FloatArray, block: int = BLOCK, *, in_place: bool = False
) -> tuple[FloatArray, FloatArray]:
    """Factor a symmetric positive definite matrix [n, n] into (U [n, n], D [n]).

    Left-looking: block column J of `F = U · sqrt(D)` is
    `(H[:, J] − F[:, >J] · F[J, >J]ᵀ) · F_JJ⁻ᵀ`.

    in_place: U takes the place of `matrix`, which is C-ordered

    Raises:
        NotPositiveDefinite: a pivot is not positive, or the matrix holds NaN or inf.
    """
    n = matrix.shape[0]
    factor = matrix if in_place else np.array(matrix, order="C")
    for start in reversed(range(0, n, block)):
        stop = min(n, start + block)
        panel = factor[:stop, start:stop]
        if stop < n:
            _subtract_later(factor, start, stop)
        corner = _upper_cholesky(panel[start:])
        panel[start:] = corner
        panel[:start] = panel[:start] @ np.linalg.inv(corner).T
        factor[stop:, start:stop] = 0
    pivots = factor.diagonal().copy()
    if not (np.isfinite(pivots).all() and (pivots > 0).all()):
        raise NotPositiveDefinite
    factor /= pivots
    return factor, pivots * pivots


def solve_right(
    matrix: FloatArray,
    upper: FloatArray,
    pivots: FloatArray,
    order: NDArray[np.intp],
    block: int = BLOCK,
) -> None:
    """`matrix · H⁻¹` in the place of `matrix` [rows, n], C-ordered, where
    `H[order][:, order] = upper · diag(pivots) · upperᵀ`.

    Two triangular solves, a block of columns at a time: with `Z = X U D`, from the last block on
    `Z_J = (B_J − Z_{>J} · U[J, >J]ᵀ) · U_JJ⁻ᵀ`, and from the first on
    `X_J = (Z_J / D_J − X_{<J} · U[<J, J]) · U_JJ⁻¹`.
    """
    blocks = strips(len(pivots), block)
    inverses = [np.linalg.inv(upper[own, own]) for own in blocks]
    back = np.argsort(order)

    def solve(rows: slice) -> None:
        part = matrix[rows][:, order]
        for own, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
            part[:, own] -= part[:, own.stop :] @ upper[own, own.stop :].T
            part[:, own] = part[:, own] @ inverse.T
        part /= pivots
        for own, inverse in zip(blocks, inverses, strict=True):
            part[:, own] -= part[:, : own.start] @ upper[: own.start, own]
            part[:, own] = part[:, own] @ inverse
        matrix[rows] = part[:, back]

    each(solve, strips(len(matrix), ROWS_AT_ONCE))


def _subtract_later(factor: FloatArray, start: int, stop: int) -> None:
    """`F[:stop, J] −= F[:stop, >J] · F[J, >J]ᵀ`, J = start … stop−1."""
    later = factor[start:stop, stop:].T

    def subtract(rows: slice) -> None:
        factor[rows, start:stop] -= factor[rows, stop:] @ later

    each(subtract, strips(stop, ROWS_AT_ONCE))


def _upper_cholesky(matrix: FloatArray) -> FloatArray:
    """`F` upper triangular with `F · Fᵀ = matrix`: LAPACK's lower factor of the flipped matrix."""
    try:
        lower = np.linalg.cholesky(matrix[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise NotPositiveDefinite from error
    return np.ascontiguousarray(lower[::-1, ::-1])
