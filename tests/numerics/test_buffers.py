"""Memory that is kept from one call to the next."""

from __future__ import annotations

from threading import Thread

import numpy as np
import pytest

from ptq_cli.numerics.buffers import MOST, kept, same_bytes


def test_the_same_name_is_the_same_memory_and_others_are_apart():
    """However they grow and shrink, and more shapes than are remembered."""
    rng = np.random.default_rng(0)
    names = [f"test {i}" for i in range(9)]
    for _ in range(600):
        shape = tuple(int(n) for n in rng.integers(0, 700, 2))
        arrays = [kept(name, shape, np.float32) for name in names]
        for number, array in enumerate(arrays):
            array[...] = number
        assert all((array == number).all() for number, array in enumerate(arrays))
    first = kept("test 0", (3, 4), np.float32)
    assert np.shares_memory(first, kept("test 0", (40,), np.uint8))
    assert first.flags.c_contiguous
    assert first.flags.aligned


def test_arrays_begin_at_places_of_their_own_in_their_pages():
    places = set()
    for size in (1000, 1 << 20):  # the second are new memory
        places = {kept(f"place {i}", (size,), np.uint8).ctypes.data % 4096 for i in range(9)}
    assert len(places) == 9
    assert all(place % 64 == 0 for place in places)


def test_threads_share_nothing():
    own = kept("test", (5,), np.float32)
    others = []
    thread = Thread(target=lambda: others.append(kept("test", (5,), np.float32)))
    thread.start()
    thread.join()
    assert not np.shares_memory(own, others[0])


def test_what_is_very_large_is_not_kept():
    first, second = (kept("large", (MOST + 1,), np.uint8) for _ in range(2))
    assert not np.shares_memory(first, second)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24, 1001])
def test_bytes_are_compared_to_the_last(size):
    a = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert same_bytes(a, a.copy())
    for place in {0, size // 2, size - 1} if size else ():
        b = a.copy()
        b[place] ^= 1
        assert not same_bytes(a, b)
