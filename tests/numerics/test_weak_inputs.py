"""Inputs and tokens that say little."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_cli.numerics.statistics import SiteAccumulator
from ptq_cli.numerics.weak_inputs import weak_inputs
from ptq_cli.numerics.weak_tokens import repeated_sequences, weak_tokens

ROWS = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float16)


def found(rows, every=8):
    sums = SiteAccumulator(8, every)
    sums.update(rows)
    return weak_inputs(sums.result("site", ("linear",)))


@pytest.mark.parametrize(
    ("rows", "every", "wanted"),
    [
        (ROWS, 8, {}),
        (np.concatenate([ROWS[:200], ROWS[:200]]), 8, {"repeated": 0.5}),
        (np.concatenate([ROWS[:280], ROWS[:120]]), 8, {}),
        (np.zeros((400, 8), np.float16), 8, {"zero": 1}),
        (ROWS, 0, {"heldout": 0}),
        (ROWS[:79], 8, {"heldout": 9}),
        (ROWS[:80], 8, {}),
        (ROWS[:1], 8, {"heldout": 0}),
        (np.tile(ROWS[:5], (80, 1)), 8, {"repeated": 1 - 5 / 400}),
        (np.repeat(ROWS[:1], 400, 0), 8, {"repeated": 1 - 1 / 400, "most_frequent": 1.0}),
    ],
)  # fmt: skip
def test_of_inputs(rows, every, wanted):
    assert found(rows, every) == pytest.approx(wanted)


IDS = np.random.default_rng(1).integers(0, 500, (12, 40))


def test_of_tokens():
    shown = np.ones(IDS.shape, bool)
    assert weak_tokens(IDS, shown) == ()
    half = IDS.copy()
    half[:, ::2] = 7
    assert weak_tokens(half, shown) == ()
    half[:, 1] = 7
    assert "token 7 makes up" in weak_tokens(half, shown)[0]
    assert weak_tokens(half, np.arange(40) % 2 == shown) == ()  # where it is hidden


def test_of_sequences_that_repeat():
    shown = np.ones((24, 40), bool)
    once = np.concatenate([IDS, IDS[:1], IDS[1:] + 500])
    assert (repeated_sequences(once, shown), weak_tokens(once, shown)) == (1, ())
    twice = np.concatenate([IDS, IDS])
    assert weak_tokens(twice, shown) == ("12 of 24 sequences repeat an earlier one",)
    shown[12:, 5:] = False
    assert repeated_sequences(twice, shown) == 0
    shown[12:] = False  # nothing but padding
    assert repeated_sequences(twice, shown) == 0
    assert weak_tokens(twice, shown) == ()


def test_of_passages_that_repeat_at_other_places():
    ids = np.resize(np.arange(37), (12, 40))
    (said,) = weak_tokens(ids, np.ones(ids.shape, bool))
    assert said == "91 % of passages of 8 tokens repeat an earlier one"
