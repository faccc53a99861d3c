"""`H = U · diag(D) · Uᵀ` with U unit upper triangular."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.numerics.ldl import BLOCK, NotPositiveDefinite, ldl_upper, solve_right
from tests.numerics.cases import damped, some_hessian

BLOCKS = (1, 2, 7, 16, 64, BLOCK)


def test_two_by_two_by_hand():
    """The last pivot stands alone; the first is what is left: 5 − 1²·2."""
    upper, pivots = ldl_upper(np.array([[5.0, 2.0], [2.0, 2.0]]))
    np.testing.assert_allclose(upper, [[1, 1], [0, 1]])
    np.testing.assert_allclose(pivots, [3, 2])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 40, 63, 64, 65])
def test_the_factors_give_the_matrix_back(n, block):
    matrix = damped(some_hessian(n))
    upper, pivots = ldl_upper(matrix, block)
    np.testing.assert_allclose(upper * pivots @ upper.T, matrix, atol=1e-12 * np.abs(matrix).max())
    assert (pivots > 0).all()


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_the_blocks_of_everyday(n):
    matrix = damped(some_hessian(n))
    upper, pivots = ldl_upper(matrix)
    np.testing.assert_allclose(upper * pivots @ upper.T, matrix, atol=1e-11 * np.abs(matrix).max())


@pytest.mark.parametrize("block", BLOCKS)
def test_upper_is_exactly_unit_upper_triangular(block):
    upper, _ = ldl_upper(damped(some_hessian(40)), block)
    assert (np.tril(upper, -1) == 0).all()
    assert (upper.diagonal() == 1).all()


def test_block_size_changes_nothing_but_the_last_bits():
    matrix = damped(some_hessian(65))
    expected, pivots = ldl_upper(matrix, 65)
    for block in BLOCKS:
        upper, d = ldl_upper(matrix, block)
        np.testing.assert_allclose(upper, expected, atol=1e-11)
        np.testing.assert_allclose(d, pivots, rtol=1e-11)


def test_it_is_the_inverse_of_the_papers_factor():
    """The paper's upper Cholesky factor of the inverse is `diag(D)^−½ · U⁻¹`."""
    matrix = damped(some_hessian(30))
    upper, pivots = ldl_upper(matrix, 8)
    papers = np.linalg.cholesky(np.linalg.inv(matrix)).T
    np.testing.assert_allclose(np.linalg.inv(upper) / np.sqrt(pivots)[:, None], papers, atol=1e-9)


def test_the_matrix_is_left_alone_and_its_dtype_kept():
    matrix = damped(some_hessian(20)).astype(np.float32)
    before = matrix.copy()
    upper, pivots = ldl_upper(matrix, 8)
    np.testing.assert_array_equal(matrix, before)
    assert upper.dtype == pivots.dtype == np.float32
    np.testing.assert_allclose(upper * pivots @ upper.T, matrix, atol=1e-5 * np.abs(matrix).max())


def test_nothing_to_factor():
    upper, pivots = ldl_upper(np.zeros((0, 0)))
    assert upper.shape == (0, 0)
    assert pivots.shape == (0,)


@pytest.mark.parametrize("block", [1, 3, 8, 64])
@pytest.mark.parametrize("where", [0, 4, 8, 11])
def test_a_matrix_with_a_negative_or_zero_pivot_is_refused(where, block):
    for value in (0.0, -1.0):
        matrix = np.eye(12)
        matrix[where, where] = value
        with pytest.raises(NotPositiveDefinite):
            ldl_upper(matrix, block)


def test_an_indefinite_matrix_with_a_positive_diagonal_is_refused():
    for block in (1, 2):
        with pytest.raises(NotPositiveDefinite):
            ldl_upper(np.array([[1.0, 2.0], [2.0, 1.0]]), block)


@pytest.mark.parametrize("block", [1, 2, 3, 64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0), (5, 5), (0, 5), (2, 3), (4, 5)])
def test_a_matrix_that_holds_no_numbers_is_refused_without_a_warning(where, bad, block):
    matrix = np.eye(6) * 3 + 0.1
    matrix[where] = matrix[where[::-1]] = bad
    with pytest.raises(NotPositiveDefinite):
        ldl_upper(matrix, block)


@pytest.mark.parametrize("block", [1, 3, 16, BLOCK])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_factors_solve_in_any_order_of_columns(block, rows, monkeypatch):
    monkeypatch.setattr("ptq_cli.numerics.ldl.ROWS_AT_ONCE", 2)
    rng = np.random.default_rng(1)
    matrix, order = damped(some_hessian(40)), rng.permutation(40)
    upper, pivots = ldl_upper(matrix[np.ix_(order, order)])
    right = rng.standard_normal((rows, 40))
    expected = np.linalg.solve(matrix, right.T).T
    solve_right(right, upper, pivots, order, block)
    np.testing.assert_allclose(right, expected, rtol=1e-9, atol=1e-10)
