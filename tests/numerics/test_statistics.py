"""Statistics: equal to their formulas, whatever the pieces; merged halves equal the whole."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.numerics import distribution as D
from ptq_cli.numerics import statistics as S


def inputs(n=1000, k=24, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, k)) @ rng.standard_normal((k, k)) + 0.3
    return (mixed * np.exp(rng.standard_normal(k))).astype(np.float16)


def collected(values, pieces=(10_000,), **options):
    sums = S.SiteAccumulator(values.shape[1], described=True, **options)
    start = 0
    for i in range(10_000):
        piece = values[start : start + pieces[i % len(pieces)]]
        if not len(piece):
            break
        sums.update(piece)
        start += len(piece)
    return sums.result("site", ("site", "other"))


def test_every_statistic_equals_its_formula():
    x = inputs()
    result = collected(x, heldout_every=0)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(result.hessian, exact.T @ exact / len(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.absmax, abs(exact).max(axis=0).astype(np.float32))
    np.testing.assert_allclose(result.absmean, abs(exact).mean(axis=0), rtol=1e-5)
    assert (result.distribution.minimum, result.distribution.maximum) == (exact.min(), exact.max())
    assert result.distribution.mean == pytest.approx(exact.mean(), rel=1e-5)
    assert result.distribution.std == pytest.approx(exact.std(), rel=1e-5)
    assert (result.n_tokens, result.n_seen) == (1000, 1000)
    assert result.linears == ("site", "other")
    assert len(result.heldout) == 0


def test_held_out_tokens_enter_no_statistic():
    x = inputs(64)
    x[7::8] *= 100  # every eighth token
    result = collected(x)
    rest = np.delete(x, np.s_[7::8], axis=0)
    np.testing.assert_array_equal(result.heldout, x[7::8])
    assert result.heldout.dtype == np.float16
    assert result.n_tokens == 56
    assert result.n_seen == 64
    np.testing.assert_array_equal(result.absmax, abs(rest).max(axis=0))
    np.testing.assert_allclose(
        result.hessian, rest.astype(np.float64).T @ rest.astype(np.float64) / 56, rtol=1e-5
    )


def test_the_held_out_tokens_can_be_named():
    x, held = inputs(100), np.isin(np.arange(100), [0, 1, 2, 50, 99])
    sums = S.SiteAccumulator(24)
    for own in (slice(0, 30), slice(30, 100)):
        sums.update(x[own], held[own])
    result = sums.result("site", ("site",))
    np.testing.assert_array_equal(result.heldout, x[held])
    assert result.n_tokens == 95


@pytest.mark.parametrize(
    ("lengths", "heldout", "expected"),
    [
        ([5] * 24, (8, 512), {7: 5, 15: 5, 23: 5}),  # every eighth sequence
        ([5] * 24, (12, 512), {11: 5, 23: 5}),
        ([5] * 64, (8, 10), {31: 5, 63: 5}),  # no more tokens than asked for, evenly spaced
        ([9, 0, 9, 3] * 4, (8, 512), {7: 3, 15: 3}),
        ([1] * 15 + [100], (8, 512), {7: 1, 15: 13}),  # at most an eighth of the tokens
        ([16] * 4, (8, 512), {3: 8}),  # too few sequences: the last eighth of the tokens
        ([30], (8, 2), {0: 2}),
        ([7], (8, 512), {}),
        ([16] * 16, (0, 512), {}),
        ([16] * 16, (8, 0), {}),
        ([4] * 3, (1, 512), {0: 4, 1: 4, 2: 4}),
    ],
)
def test_whole_sequences_are_held_out(lengths, heldout, expected):
    held = S.heldout_tokens(lengths, heldout)
    parts = np.split(held, np.cumsum(lengths)[:-1])
    assert {n: int(part.sum()) for n, part in enumerate(parts) if part.any()} == expected


def test_the_last_of_too_few_tokens_are_held_out():
    assert np.flatnonzero(S.heldout_tokens([16, 16], (8, 512))).tolist() == [28, 29, 30, 31]


def test_tokens_after_the_limit_are_not_held_out():
    result = collected(inputs(100), heldout_limit=3)
    assert len(result.heldout) == 3
    assert result.n_tokens == 97


@pytest.mark.parametrize("pieces", [(1,), (3, 50, 7), (999,), (1000,)])
def test_bits_do_not_depend_on_the_pieces(pieces, monkeypatch):
    monkeypatch.setattr(S, "CHUNK_ELEMENTS", 300 * 24)
    x = inputs()
    whole, parts = collected(x), collected(x, pieces)
    np.testing.assert_array_equal(whole.hessian, parts.hessian)
    np.testing.assert_array_equal(whole.heldout, parts.heldout)
    np.testing.assert_array_equal(whole.distribution.histogram, parts.distribution.histogram)


def test_blocks_of_columns_give_the_same_hessian(monkeypatch):
    x = inputs(500, 40)
    whole = collected(x)
    monkeypatch.setattr(S, "BLOCK_COLUMNS", 16)
    blocks = collected(x)
    np.testing.assert_allclose(blocks.hessian, whole.hessian, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(blocks.hessian, blocks.hessian.T)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_dtypes_are_accepted(dtype):
    x = inputs(64).astype(dtype)
    result = collected(x)
    assert result.heldout.dtype == (np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(result.hessian, collected(inputs(64)).hessian)


@pytest.mark.parametrize("cut", [8, 400, 5000])
def test_two_halves_merge_to_the_whole(cut):
    x = inputs(6000)
    a, b = collected(x[:cut]), collected(x[cut:])
    merged, whole = S.merge(a, b, S.HELDOUT_LIMIT), collected(x)
    scale = abs(whole.hessian).max()
    np.testing.assert_allclose(merged.hessian / scale, whole.hessian / scale, atol=1e-6)
    np.testing.assert_array_equal(merged.heldout, whole.heldout)
    np.testing.assert_array_equal(merged.absmax, whole.absmax)
    np.testing.assert_array_equal(merged.distribution.histogram, whole.distribution.histogram)
    assert merged.distribution.start == whole.distribution.start
    assert (merged.distribution.minimum, merged.distribution.maximum) == (
        whole.distribution.minimum,
        whole.distribution.maximum,
    )
    assert (merged.n_tokens, merged.n_seen) == (whole.n_tokens, whole.n_seen)
    np.testing.assert_allclose(merged.absmean, whole.absmean, rtol=1e-5)
    assert merged.distribution.std == pytest.approx(whole.distribution.std, rel=1e-5)
    assert D.percentile(merged.distribution, 0.99) == D.percentile(whole.distribution, 0.99)


@pytest.mark.parametrize("cut", [400, 5000])
def test_a_diagonal_alone_is_that_of_the_hessian(cut):
    x = inputs(6000)
    both = [collected(x[own], whole=False) for own in (np.s_[:cut], np.s_[cut:])]
    whole, merged = collected(x), S.merge(*both, S.HELDOUT_LIMIT, whole=False)
    expected = np.diag(whole.hessian.diagonal())
    for found in (collected(x, (7, 100), whole=False), merged):
        np.testing.assert_allclose(found.hessian, expected, rtol=1e-5)
        assert found.hessian.dtype == np.float32
        for exact in ("heldout", "absmax"):
            np.testing.assert_array_equal(getattr(found, exact), getattr(whole, exact))
    assert S.statistics_memory(1024, 9000, whole=False) <= 0.5 * S.statistics_memory(1024, 9000)


def test_merging_different_sites_is_refused():
    a = collected(inputs(64))
    with pytest.raises(InputError, match=r"site \[24\] with site \[16\]"):
        S.merge(a, collected(inputs(64, 16)), 512)


@pytest.mark.parametrize("p", [0.001, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_percentiles_are_order_statistics_within_their_bound(p):
    x = inputs(3000)
    result = collected(x, heldout_every=0)
    ordered = np.sort(abs(x.astype(np.float64)).ravel())
    exact = ordered[ceil(p * len(ordered)) - 1]
    assert D.percentile(result.distribution, p) == pytest.approx(exact, rel=2**-8)


def test_static_scale_falls_back_to_absmax_then_to_one():
    zeros = np.zeros((200, 8), np.float32)
    assert D.static_scale(collected(zeros).distribution) == 1.0
    zeros[1, 3] = 254
    assert D.percentile(collected(zeros).distribution, 0.99) == 0
    assert D.static_scale(collected(zeros).distribution) == 2.0
    x = inputs(1000)
    result = collected(x)
    assert D.static_scale(result.distribution) == D.percentile(result.distribution, 0.99) / 127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_named(bad):
    x = inputs(100).astype(np.float32)
    x[63, 5] = x[80, 1] = bad
    sums = S.SiteAccumulator(24)
    sums.update(x[:50])
    with pytest.raises(S.NonFiniteInput) as error:
        sums.update(x[50:])
    assert (error.value.token, error.value.channel) == (63, 5)


def test_no_tokens_is_an_error():
    with pytest.raises(InputError, match="no tokens"):
        S.SiteAccumulator(4).result("site", ("site",))


@pytest.mark.parametrize("whole", [True, False])
def test_squares_that_overflow_are_an_error(whole):
    sums = S.SiteAccumulator(2, whole=whole)
    sums.update(np.full((16, 2), 1e30, np.float32))
    with pytest.raises(InputError, match="overflow float32"):
        sums.result("site", ("site",))
