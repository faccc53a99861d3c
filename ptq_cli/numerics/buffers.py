"""Memory that is kept from one call to the next.

Pages that are there already are filled several times faster than new ones, and what fits the cache
stays in it. Small arrays share a block that is large enough for the system's huge pages (numpy asks
for them from 4 MB on): the cache then holds more of it. Each begins at a cache line of its own and
at another place in its page: a loop over two arrays at the same place in their pages waits for
itself.
"""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

MOST = 256 << 20  # bytes; larger arrays are not kept
_BLOCK, _SHARE = 16 << 20, 4 << 20  # bytes of a block, and of the largest array in one
_LINE, _PAGE = 64, 4096
_STEP = 5 * _LINE  # from the place of one array in its page to that of the next
_MOST_SHAPES = 256


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, NDArray[np.uint8]] = {}
        self.numbers: dict[str, int] = {}
        self.arrays: dict[Any, NDArray[Any]] = {}
        self.block = np.empty(0, np.uint8)


_kept = _Kept()


def kept(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of `shape`, contents unknown, whose memory the next call with the same name on the
    same thread hands out again."""
    array = _kept.arrays.get((name, shape, dtype))
    return _new(name, shape, dtype) if array is None else array


def _new(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    buffers, arrays = _kept.buffers, _kept.arrays
    size = prod(shape) * np.dtype(dtype).itemsize
    if size > MOST:
        return np.empty(shape, dtype)
    if name not in buffers or len(buffers[name]) < size:
        number = _kept.numbers.setdefault(name, len(_kept.numbers))
        buffers[name] = _room(size, number)
        arrays.clear()
    if len(arrays) > _MOST_SHAPES:
        arrays.clear()
    array: NDArray[Any] = buffers[name][:size].view(dtype).reshape(shape)
    arrays[name, shape, dtype] = array
    return array


def _room(size: int, number: int) -> NDArray[np.uint8]:
    """Bytes [size] whose address says by its place in the page which of the arrays it is."""
    block = np.empty(size + _PAGE, np.uint8) if size > _SHARE else _kept.block
    if len(block) < size + _PAGE:
        block = np.empty(_BLOCK, np.uint8)
    start = (number * _STEP - block.ctypes.data) % _PAGE
    if size <= _SHARE:
        _kept.block = block[start + size :]
    return block[start : start + size]


def same_bytes(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    """`np.array_equal` of contiguous bytes of the same shape, eight at a time."""
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    whole = len(flat_a) // 8 * 8
    words_a, words_b = flat_a[:whole].view(np.uint64), flat_b[:whole].view(np.uint64)
    return np.array_equal(words_a, words_b) and np.array_equal(flat_a[whole:], flat_b[whole:])
