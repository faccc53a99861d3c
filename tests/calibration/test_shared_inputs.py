"""Linears share sums of their inputs only while every call shows them the same; statistics are
always those of a linear's own inputs."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

from ptq_cli.calibration.shared_inputs import SharedInputs
from ptq_cli.numerics.statistics import SiteAccumulator

HELDOUT = (4, 8)
X, Y, Z = (np.random.default_rng(n).standard_normal((5, 6)).astype(np.float32) for n in range(3))


def captured(calls, linears=("q", "k", "v"), identity=lambda rows: None):
    shared = SharedInputs(linears, HELDOUT)
    for linear, rows in calls:
        shared.take(linear, lambda rows=rows: rows.copy(), identity(rows), rows)
    return {statistics.linears: statistics for statistics in shared.results()}


def check(found, calls):
    """Each linear's statistics are those of all that it was called with, in that order."""
    of = {linear: statistics for linears, statistics in found.items() for linear in linears}
    assert sum(map(len, found)) == len(of)
    for linear, own in groupby(sorted(calls, key=lambda call: call[0]), key=lambda call: call[0]):
        sums = SiteAccumulator(6, *HELDOUT)
        for _, rows in own:
            sums.update(rows)
        wanted = sums.result(linear, (linear,))
        assert of[linear].n_seen == wanted.n_seen
        assert np.array_equal(of[linear].heldout, wanted.heldout)
        assert np.array_equal(of[linear].hessian, wanted.hessian)
    return list(found)


def calls(text, **arrays):
    """`q=x k=y`: calls in this order."""
    values = {"x": X, "y": Y, "z": Z, **arrays}
    return [(call[0], values[call[2]]) for call in text.split()]


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("q=x k=x v=x q=y k=y v=y", [("q", "k", "v")]),
        ("q=x k=y v=y q=z k=x v=x", [("q",), ("k", "v")]),  # cross attention
        ("q=x k=x v=y q=z k=z v=x", [("q", "k"), ("v",)]),  # places are added to q and k alone
        ("q=x k=y v=x", [("q", "v"), ("k",)]),
        ("k=x q=x v=x v=y q=y k=y", [("q", "k", "v")]),  # in any order
        ("q=x k=x v=x q=y k=z v=z", [("q",), ("k", "v")]),  # apart only later
        ("q=x k=x v=x q=y k=z v=z q=x k=x v=x", [("q",), ("k", "v")]),  # and for good
        ("q=x k=x v=x q=y q=z k=y", [("q",), ("k",), ("v",)]),  # not called every time
        ("q=x q=y k=x k=y v=x v=y", [("q",), ("k",), ("v",)]),  # called in another rhythm
        ("q=x q=y", [("q",)]),
        ("q=x k=x q=y k=y", [("q", "k")]),  # and v never
        ("k=x", [("k",)]),
    ],
)
def test_what_shares(text, shared):
    made = calls(text)
    assert check(captured(made), made) == shared
    made = calls(text, y=Y[:2])  # batches of different sizes
    assert check(captured(made), made) == shared
    assert check(captured(made, identity=id), made) == shared


def test_an_identity_spares_a_look_at_the_values():
    looked = []
    shared = SharedInputs(("q", "k"), HELDOUT)
    for linear in "qk":
        shared.take(linear, lambda linear=linear: looked.append(linear) or X, "same", X)
    assert looked == ["q"]
    assert [statistics.linears for statistics in shared.results()] == [("q", "k")]


def test_nothing_called_is_nothing():
    assert captured([]) == {}
    assert captured([("q", X[:0])]) == {}  # no tokens
