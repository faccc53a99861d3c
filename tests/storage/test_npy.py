"""The one door for .npy files: only our errors, never a pickle, nothing believed."""

from __future__ import annotations

import pickle
import random
import resource
import struct

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.errors import PtqError
from ptq_cli.storage.npy import open_inputs, open_npy
from tests.builders import overwrite, random_inputs

MUTANTS = 1500


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(path, array):
    np.save(path, array)
    return path


# ---- good files ----


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(24, 5), (2, 12, 5), (2, 3, 4, 5), (24, 1), (1, 5)])
def test_any_order_and_shape_gives_the_tokens(tmp_path, dtype, order, shape):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype, order=order)
    inputs = open_inputs(saved(tmp_path / "a.npy", values), bf16=False)
    tokens = values.reshape(-1, shape[-1])
    assert (inputs.n_tokens, inputs.in_features) == tokens.shape
    for start, stop in ((0, len(tokens)), (0, 1), (len(tokens) // 2, len(tokens))):
        part = inputs.read(start, stop)
        assert np.array_equal(part, tokens[start:stop])
        assert part.dtype.isnative
        assert part.flags.c_contiguous


def test_bfloat16_as_uint16(tmp_path):
    values = random_inputs(6, 4, dtype=ml_dtypes.bfloat16)
    path = saved(tmp_path / "a.npy", values.view(np.uint16))
    part = open_inputs(path, bf16=True).read(1, 5)
    assert part.dtype == ml_dtypes.bfloat16
    assert np.array_equal(part, values[1:5])
    with pytest.raises(PtqError, match="--bf16"):
        open_inputs(path, bf16=False)


def test_version_2_headers(tmp_path):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.ones((3, 2), np.float32), version=(2, 0))
    assert open_npy(path).shape == (3, 2)


def test_zero_tokens_are_a_good_file(tmp_path):
    assert open_inputs(saved(tmp_path / "a.npy", np.zeros((0, 4), "f4")), False).n_tokens == 0


# ---- bad files ----


@pytest.mark.parametrize("kind", ["object array", "pickle", "pickle protocol 0", "structured"])
def test_pickles_are_never_executed(tmp_path, kind):
    canary = tmp_path / "canary"
    path = tmp_path / "a.npy"
    if kind == "object array":
        np.save(path, np.array([[Canary(canary)]], object), allow_pickle=True)
    elif kind == "structured":
        array = np.zeros((2, 2), [("a", "f4"), ("b", object)])
        array["b"] = Canary(canary)
        np.save(path, array, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Canary(canary), 0 if kind.endswith("0") else 4))
    with pytest.raises(PtqError, match=r"a\.npy"):
        open_npy(path)
    assert not canary.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes()).close()
        assert canary.exists()  # it is a canary


def header(text: bytes, version=1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text


@pytest.mark.parametrize(
    "text",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976, 8)}\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -8)}\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, True)}\n",
        b"{'descr': '<f4', 'fortran_order': 0, 'shape': (1, 8)}\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1.0, 8)}\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': [1, 8]}\n",
        b"{'descr': '<f4', 'fortran_order': False}\n",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (4,)}\n",
        b"{'descr': 'nonsense', 'fortran_order': False, 'shape': (1, 8)}\n",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 8)}\n",
        b"__import__('os').system('touch canary')\n",
        b"(" * 9000,
        b"[" * 60000,
        b"",
        b"\xff" * 40,
        b"'" + b"a" * 1000,
    ],
    ids=lambda text: text[:60].decode("latin-1"),
)
def test_headers_that_lie(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npy"
    path.write_bytes(header(text, 1 if len(text) < 1 << 16 else 2) + bytes(32))
    with pytest.raises(PtqError, match=r"a\.npy"):
        open_inputs(path, bf16=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy"]


def test_a_claim_of_much_costs_nothing(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = b"{'descr': '<f4', 'fortran_order': True, 'shape': (34359738368, 8)}\n"
    for content in (header(text), b"\x93NUMPY\2\0\xff\xff\xff\xff" + text):
        (tmp_path / "a.npy").write_bytes(content + bytes(64))
        with pytest.raises(PtqError):
            open_npy(tmp_path / "a.npy")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_mutants_meet_only_our_errors(tmp_path, recwarn):
    path = saved(tmp_path / "a.npy", random_inputs(6, 4, dtype=np.float32))
    good = path.read_bytes()
    rng = random.Random(5)
    accepted = 0
    for _ in range(MUTANTS):
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(min(128, len(content)))
            kind = rng.randrange(4)
            if kind == 0:
                content[place] = rng.randrange(256)
            elif kind == 1:
                del content[place]
            elif kind == 2:
                content.insert(place, rng.choice(b"0123456789()[]{}'\", :-OfiuLV|<>\\\n#"))
            else:
                del content[rng.randrange(len(content)) :]
                content += b" " * rng.randrange(3)
            if not content:
                break
        overwrite(path, content)
        try:
            inputs = open_inputs(path, bf16=False)
        except PtqError as error:
            words = str(error)
        else:
            accepted += 1
            assert inputs.read(0, inputs.n_tokens).shape == (inputs.n_tokens, inputs.in_features)
            continue
        assert str(path) in words
    assert 0 < accepted < MUTANTS / 2
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path, order):
    path = saved(tmp_path / "a.npy", np.ones((50, 40), np.float32, order=order))
    inputs = open_inputs(path, bf16=False)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(PtqError, match="changed while it was read"):
        inputs.read(10, 50)
