"""Weights files that are laid out beforehand and filled in any order."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from ptq_cli.errors import FileError
from ptq_cli.storage.shards import Shards
from ptq_cli.storage.tensors import as_bytes

A, B = np.arange(300_000, dtype=np.float32), np.arange(7, dtype=np.uint8)  # A: several pieces


def laid_out(folder):
    parts = [(name, [as_bytes(name, values).spec]) for name, values in (("a", A), ("b", B))]
    return Shards(folder, parts, lambda names: {}, 1 << 30)


def test_tensors_come_back_in_whatever_order_they_were_put(tmp_path):
    shards = laid_out(tmp_path)
    shards.put([as_bytes("b", B)])
    assert shards.missing == {"a"}
    shards.put([as_bytes("a", A)])
    assert shards.finish(lambda names: {}) == dict.fromkeys("ab", "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["b"], B)


def test_a_tensor_from_another_file_is_the_same(tmp_path):
    (tmp_path / "other").mkdir()
    other = laid_out(tmp_path / "other")
    other.put([as_bytes("a", A)])
    shards = laid_out(tmp_path)
    shards.put([other.places["a"], as_bytes("b", B)])
    shards.finish(lambda names: {})
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["a"], A)


def test_what_was_not_written_is_not_taken_for_written(tmp_path):
    shards = laid_out(tmp_path)
    shards.put([as_bytes("a", A)])
    with pytest.raises(FileError, match="'b' was not written"):
        shards.put([shards.places["b"]])
    with pytest.raises(FileError, match="1 tensors were not written"):
        shards.finish(lambda names: {})
