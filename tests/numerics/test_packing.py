"""Codes as bits: bytes worked out by hand, Python's long integers, and back again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_cli.numerics import packing
from ptq_cli.numerics.packing import (
    pack,
    pack_groups,
    packed_width,
    unpack,
    unpack_groups,
)
from tests import oracles

BITS = range(2, 9)


def row(*codes):
    return np.array([codes], np.uint8)


def some_codes(rows, columns, bits, seed=0):
    rng = np.random.default_rng((seed, rows, columns, bits))
    return rng.integers(0, 2**bits, (rows, columns), dtype=np.uint8)


# ---- by hand ----


def test_four_bits_are_low_then_high_nibble():
    assert pack(row(0x1, 0x2, 0xF, 0x0), 4).tolist() == [[0x21, 0x0F]]


def test_two_bits_fill_a_byte_from_its_low_end():
    assert pack(row(1, 2, 3, 0), 2).tolist() == [[0b00_11_10_01]]


def test_an_odd_code_leaves_the_high_nibble_empty():
    assert pack(row(0xA, 0xB, 0xC), 4).tolist() == [[0xBA, 0x0C]]


def test_three_bits_straddle_bytes():
    """5 | 6<<3 | 7<<6 | 1<<9 | 2<<12 | 3<<15 | 4<<18 | 5<<21: the third and the sixth code lie on
    two bytes each."""
    codes = row(0b101, 0b110, 0b111, 0b001, 0b010, 0b011, 0b100, 0b101)
    expected = [0b11_110_101, 0b1_010_001_1, 0b101_100_01]
    assert pack(codes, 3).tolist() == [expected]
    assert unpack(np.array([expected], np.uint8), 3, 8).tolist() == codes.tolist()


def test_five_bits_straddle_bytes():
    """17 | 30<<5 leaves ten bits: one whole byte and two bits of the next."""
    assert pack(row(0b10001, 0b11110), 5).tolist() == [[0b110_10001, 0b11]]


def test_eight_bits_are_bytes():
    assert pack(row(0, 127, 255), 8).tolist() == [[0, 127, 255]]


def test_every_group_starts_on_a_byte():
    """Groups of three 4-bit codes take two bytes; a short last group takes as many."""
    codes = row(1, 2, 3, 4, 5, 6, 7)
    assert pack_groups(codes, 4, 3).tolist() == [[0x21, 0x03, 0x54, 0x06, 0x07, 0x00]]


def test_groups_of_three_bits():
    """Three 3-bit codes are nine bits: 1 | 2<<3 | 7<<6 = 0x1d1."""
    assert pack_groups(row(1, 2, 7, 7, 7, 7), 3, 3).tolist() == [[0xD1, 0x01, 0xFF, 0x01]]


# ---- against Python's integers, and back ----


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_of_one_long_integer(bits):
    for columns in (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64, 65):
        codes = some_codes(3, columns, bits)
        packed = pack(codes, bits)
        assert packed.shape == (3, packed_width(columns, bits))
        assert [bytes(line) for line in packed] == [oracles.packed_row(r, bits) for r in codes]


layouts = st.tuples(
    st.integers(2, 8), st.integers(0, 5), st.integers(0, 70), st.integers(1, 40), st.integers(0, 99)
)


@settings(deadline=None)
@given(layouts)
def test_unpacking_gives_back_what_was_packed(layout):
    bits, rows, columns, width, seed = layout
    codes = some_codes(rows, columns, bits, seed)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, columns), codes)
    packed = pack_groups(codes, bits, width)
    np.testing.assert_array_equal(unpack_groups(packed, bits, width, columns), codes)


@settings(deadline=None)
@given(layouts)
def test_groups_are_those_of_python_integers(layout):
    bits, rows, columns, width, seed = layout
    columns += 1
    codes = some_codes(rows, columns, bits, seed)
    packed = pack_groups(codes, bits, width)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, -(-columns // width) * packed_width(width, bits))
    assert [bytes(r) for r in packed] == [oracles.packed_groups(r, bits, width) for r in codes]


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_and_the_smallest_code_survive(bits):
    for code in (0, 2**bits - 1):
        codes = np.full((2, 13), code, np.uint8)
        np.testing.assert_array_equal(unpack(pack(codes, bits), bits, 13), codes)


@pytest.mark.parametrize("bits", BITS)
def test_nothing_and_next_to_nothing(bits):
    for shape in ((0, 5), (4, 0), (0, 0), (1, 1)):
        codes = some_codes(*shape, bits)
        for width in (1, 3, 8):
            packed = pack_groups(codes, bits, width)
            back = unpack_groups(packed, bits, width, shape[1])
            assert back.shape == shape
            np.testing.assert_array_equal(back, codes)


def test_codes_in_any_memory_order_give_the_same_bytes():
    codes = some_codes(6, 24, 4)
    for bits in BITS:
        part = codes & (2**bits - 1)
        expected = pack_groups(part, bits, 5)
        np.testing.assert_array_equal(pack_groups(np.asfortranarray(part), bits, 5), expected)
        np.testing.assert_array_equal(pack(np.asfortranarray(part), bits), pack(part, bits))


def test_the_result_owns_its_bytes():
    """Packing eight bits is a copy, not a view of the codes."""
    codes = some_codes(2, 4, 8)
    packed = pack(codes, 8)
    packed[:] = 0
    assert codes.any()


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_strips_of_rows_join_without_a_seam(monkeypatch, bits):
    codes = some_codes(10, 21, bits)
    whole = pack(codes, bits)
    for at_once in (1, 21, 50, 63):
        monkeypatch.setattr(packing, "_ROWS_AT_ONCE", at_once)
        np.testing.assert_array_equal(pack(codes, bits), whole)
