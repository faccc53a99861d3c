"""Rows that are read as they are asked for, and the digest that is taken on the way."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.errors import FileError, InputError
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.digest import Message, digest_of
from ptq_cli.storage.rows import FileRows

SHAPE = (700, 520)  # three pieces, none of them a whole number of the digest's blocks
NAME = "layer.weight"


@pytest.fixture
def weight():
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)


@pytest.fixture
def rows(tmp_path, weight):
    save_file({"other": np.zeros(3, np.float16), NAME: weight}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    with FileRows(checkpoint, Layer("layer", NAME, SHAPE, SHAPE, "F16", Grid(4))) as rows:
        yield rows


def test_rows_are_those_of_the_tensor(rows, weight):
    np.testing.assert_array_equal(rows[:], weight.astype(np.float32))
    np.testing.assert_array_equal(rows[251:600], weight[251:600].astype(np.float32))
    assert rows[:].dtype == np.float32


@pytest.mark.parametrize(
    "asked",
    [[(0, 252), (252, 504), (504, 700)], [(0, 101), (101, 350), (350, 700)],
     [(504, 700), (0, 252), (252, 504)], [(0, 700)], [],
     [(0, 252), (0, 252), (300, 400)]],
    ids=["in order", "unevenly", "out of order", "at once", "never", "some"],
)  # fmt: skip
def test_the_digest_is_the_tensors_however_rows_were_asked_for(rows, weight, asked):
    for start, stop in asked:
        rows[start:stop]
    assert rows.digest() == digest_of(weight.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("cut", [1001, 32768, 131072, 150_001, 10**6])
def test_a_message_is_the_same_however_it_is_cut(cut):
    data = np.random.default_rng(1).integers(0, 256, 200_003, dtype=np.uint8)
    message = Message()
    for start in range(0, len(data), cut):
        message.update(data[start : start + cut].copy())
    assert message.hexdigest() == digest_of(data)
    data[100_000] ^= 1
    assert message.hexdigest() != digest_of(data)


def test_what_is_not_finite_is_named(tmp_path, weight):
    weight[600, 7] = np.nan
    save_file({NAME: weight}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    layer = Layer("layer", NAME, SHAPE, SHAPE, "F16", Grid(4))
    with (
        FileRows(checkpoint, layer) as rows,
        pytest.raises(InputError, match=r"NaN or inf at index \[600, 7\], 1 in all"),
    ):
        rows.check()


def test_a_file_that_shrinks_is_an_error(rows, tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    with pytest.raises(FileError, match="changed while it was read"):
        rows[:]
