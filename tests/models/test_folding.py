"""Folding changes no family's function: blocks in plain NumPy, before and after."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.models.detect import find_sites
from ptq_cli.models.folding import (
    fold_into_linear_rows,
    fold_into_norm,
    inputs_after,
    scale_columns,
)
from ptq_cli.models.sites import Norm, Preceding, Rows
from ptq_cli.numerics.smoothquant import function_change, tied
from tests.folds import fold_site
from tests.models.blocks import FAMILIES, HEAD_DIM, HIDDEN, block, config, tensors

UNGROUPED = ("opt", "gpt2", "bloom")
GROUPED = [(f, kv) for f in FAMILIES for kv in (4, 2, 1) if kv == 4 or f not in UNGROUPED]
LEFT_ALONE = {"gpt2": 1, "bloom": 1}  # sites behind gelu


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def sites_of(family, model, kv_heads=4):
    specs = {name: TensorSpec(name, "F64", array.shape) for name, array in model.items()}
    found = find_sites(specs, config(family, kv_heads))
    assert found.family == family
    return found.sites


def inner(model):
    """One block's tensors by their inner names."""
    return {n.split(".0.", 1)[1]: a for n, a in model.items() if ".0." in n}


def some_factors(rng, site):
    factors = np.exp2(rng.uniform(-6, 6, site.in_features)).astype(np.float32)
    return tied(factors, site.ties)


def fold_all(rng, sites, model):
    """Fold every site that can be, each into the result of the last; the factors by site."""
    factors = {}
    for site in sites:
        if site.feeder is not None:
            changed, factors[site.name], _ = fold_site(site, model, some_factors(rng, site))
            model = {**model, **changed}
    return model, factors


@pytest.mark.parametrize(("family", "kv_heads"), GROUPED)
@pytest.mark.parametrize(("dtype", "close"), [(np.float64, 1e-10), (np.float32, 1e-5)])
def test_a_block_computes_what_it_did(rng, family, kv_heads, dtype, close):
    model = tensors(family, rng, kv_heads)
    model = {name: array.astype(dtype) for name, array in model.items()}
    x = rng.standard_normal((7, HIDDEN)).astype(dtype)
    sites = sites_of(family, model, kv_heads)
    assert sum(site.feeder is None for site in sites) == LEFT_ALONE.get(family, 0)
    folded, factors = fold_all(rng, sites, model)
    before, inputs_before = block(family, inner(model), x)
    after, seen_after = block(family, inner(folded), x)
    assert np.linalg.norm(after - before) < close * np.linalg.norm(before)
    for site in sites:
        for linear in site.linears:
            name = linear.module.split(".0.", 1)[1]
            expected = inputs_before[name] / factors.get(site.name, 1)
            np.testing.assert_allclose(seen_after[name], expected, rtol=0, atol=close * 100)
            changed = not np.array_equal(folded[linear.tensor], model[linear.tensor])
            assert changed == (site.feeder is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_a_fold_changes_is_announced(rng, family):
    model = tensors(family, rng)
    for site in sites_of(family, model):
        if site.feeder is None:
            continue
        changed, _, _ = fold_site(site, model, some_factors(rng, site))
        assert set(changed) == set(site.tensors)
        for name, array in changed.items():
            assert array.shape == model[name].shape
            assert array.dtype == model[name].dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_costs_only_the_rounding_of_the_columns(rng, family):
    """The gain is rounded first and the columns follow it, so Gemma's `1 + weight` costs no more
    than any other."""
    wide = tensors(family, rng)
    model = {name: array.astype(ml_dtypes.bfloat16) for name, array in wide.items()}
    site = sites_of(family, model)[0]
    inputs = rng.standard_normal((50, HIDDEN)).astype(np.float32)
    factors = some_factors(rng, site)
    changed, used, _ = fold_site(site, model, factors)
    after = {**model, **changed}
    seen = inputs_after(site, model, after, inputs, used)
    kept = [linear.tensor for linear in site.linears]

    def weights(source):
        arrays = [source[name].astype(np.float64) for name in kept]
        return [a.T if family == "gpt2" else a for a in arrays]

    assert function_change(inputs, weights(model), seen, weights(after)) < 0.005
    if "gemma" not in family:
        np.testing.assert_allclose(used, factors, rtol=0.005)


def test_powers_of_two_are_exact_in_bfloat16(rng):
    wide = tensors("llama", rng)
    model = {name: array.astype(ml_dtypes.bfloat16) for name, array in wide.items()}
    site = sites_of("llama", model)[0]
    factors = np.exp2(np.rint(np.log2(some_factors(rng, site))))
    changed, used, _ = fold_site(site, model, factors)
    np.testing.assert_array_equal(used, factors)
    for linear in site.linears:
        expected = model[linear.tensor].astype(np.float32) * factors
        np.testing.assert_array_equal(changed[linear.tensor].astype(np.float32), expected)


def test_a_gain_that_would_vanish_stays_and_is_noted(rng):
    wide = tensors("gemma", rng)
    model = {name: array.astype(ml_dtypes.bfloat16) for name, array in wide.items()}
    site = sites_of("gemma", model)[0]
    factors = np.ones(HIDDEN, np.float32)
    factors[[2, 5]] = 1e6
    changed, used, notes = fold_site(site, model, factors)
    assert used[[2, 5]].tolist() == [1, 1]
    assert "2 channels" in notes[0]
    name = site.tensors[0]
    np.testing.assert_array_equal(changed[name][[2, 5]], model[name][[2, 5]])


def test_norms_are_divided_gain_and_bias():
    gain, bias = np.array([2.0, 3.0], np.float32), np.array([1.0, -1.0], np.float32)
    factors = np.array([2.0, 0.5], np.float32)
    assert fold_into_norm(gain, factors).tolist() == [1, 6]
    assert fold_into_norm(bias, factors).tolist() == [0.5, -2]
    assert fold_into_norm(gain, factors, plus_one=True).tolist() == [0.5, 7]


def test_rows_and_columns_by_hand():
    weight, bias = np.arange(6, dtype=np.float32).reshape(3, 2), np.full(3, 12, np.float32)
    factors = np.array([2.0, 4.0], np.float32)
    rows = Rows(1, 1, 1)
    new = fold_into_linear_rows(weight, factors, rows)
    assert new.tolist() == [[0, 1], [1, 1.5], [1, 1.25]]
    assert fold_into_linear_rows(bias, factors, rows).tolist() == [12, 6, 3]
    turned = fold_into_linear_rows(weight.T, factors, rows, transposed=True)
    np.testing.assert_array_equal(turned, new.T)
    assert scale_columns(weight, factors).tolist() == [[0, 4], [4, 12], [8, 20]]
    np.testing.assert_array_equal(
        scale_columns(weight.T, factors, transposed=True), scale_columns(weight, factors).T
    )


def test_tied_inputs_need_equal_factors(rng):
    model = tensors("llama", rng, kv_heads=2)
    site = sites_of("llama", model, 2)[1]
    assert isinstance(site.feeder, Preceding)
    assert site.ties is not None
    assert site.ties.tolist()[: 2 * HEAD_DIM] == [*range(HEAD_DIM), *range(HEAD_DIM)]
    with pytest.raises(InputError, match="same smoothing factor"):
        fold_site(site, model, np.arange(1, site.in_features + 1, dtype=np.float32))


def test_what_does_not_fit_is_an_error(rng):
    model = {n: a.astype(np.float16) for n, a in tensors("llama", rng).items()}
    site = sites_of("llama", model)[0]
    assert isinstance(site.feeder, Norm)
    with pytest.raises(InputError, match="in_features 24"):
        fold_site(site, model, np.ones(23, np.float32))
    with pytest.raises(NumericalError, match="factor"):
        fold_site(site, model, np.zeros(24, np.float32))
    with pytest.raises(NumericalError, match="float16"):
        fold_site(site, model, np.full(24, 1e-6, np.float32))
