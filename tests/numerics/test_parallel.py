"""Pieces of work: together they are all of it, whoever does them."""

from __future__ import annotations

import pytest

from ptq_cli.numerics.parallel import each, equal_strips, strips, use_threads


@pytest.mark.parametrize(("stop", "most", "lengths"), [
    (576, 384, [288, 288]), (384, 384, [384]), (385, 384, [193, 192]), (1, 384, [1]),
    (4096, 384, [373] * 10 + [366]), (5, 1, [1] * 5), (0, 384, []),
])  # fmt: skip
def test_equal_strips_are_as_few_as_the_longest_allows(
    stop: int, most: int, lengths: list[int]
) -> None:
    found = equal_strips(stop, most)
    assert [own.stop - own.start for own in found] == lengths
    assert [x for own in found for x in range(own.start, own.stop)] == list(range(stop))


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_pieces(threads: int) -> None:
    with use_threads(threads):
        assert each(lambda own: own.start, strips(50, 7)) == list(range(0, 50, 7))
