"""Headers of safetensors files: only our errors, and the library's own verdict."""

from __future__ import annotations

import json
import random
import struct
from math import prod

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from ptq_cli.core.tensors import DTYPE_BITS
from ptq_cli.errors import PtqError
from ptq_cli.storage.checkpoint import MAX_HEADER, open_checkpoint, read_header
from ptq_cli.storage.tensors import NUMPY_DTYPES, as_bytes, serialize
from tests.builders import (
    overwrite,
    raw_safetensors,
    read_model,
    safetensors,
    small_tensors,
    write_model,
)

MUTANTS = 2000


def verdict(path):
    """Whether this project opens the file. Any error but its own is a failure of the test."""
    try:
        read_header(path)
    except PtqError as error:
        words = str(error)
    else:
        return True
    assert str(path) in words
    return False


def librarys_verdict(path):
    try:
        with safe_open(path, "np"):
            return True
    except SafetensorError:
        return False


# ---- good files ----


def test_every_dtype_the_library_knows_is_read(tmp_path):
    for word, bits in DTYPE_BITS.items():
        header = {"w": {"dtype": word, "shape": [4, 8], "data_offsets": [0, 4 * bits]}}
        path = tmp_path / "one.safetensors"
        path.write_bytes(raw_safetensors(header, bytes(4 * bits)))
        assert verdict(path) is librarys_verdict(path) is True, word


def test_values_come_back_in_their_own_dtype(tmp_path):
    rng = np.random.default_rng(0)
    for word, dtype in NUMPY_DTYPES.items():
        values = rng.integers(0, 2, (3, 5)).astype(dtype)
        path = write_model(tmp_path / f"{word}.safetensors", {"w": values})
        read = open_checkpoint(path).read("w")
        assert read.dtype == dtype
        assert read.tobytes() == values.tobytes()


def test_a_header_padded_with_spaces_and_null_metadata(tmp_path):
    path = tmp_path / "padded.safetensors"
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    for text in (json.dumps({"w": entry}) + "   ", json.dumps({"__metadata__": None, "w": entry})):
        path.write_bytes(raw_safetensors(text.encode(), b"ab"))
        assert verdict(path) is librarys_verdict(path) is True


def test_what_is_written_the_library_reads(tmp_path):
    """Fortran order, strides, broadcasts, scalars and empty arrays: the gate makes them bytes."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "c": base,
        "fortran": np.asfortranarray(base),
        "transposed": base.T,
        "strided": base[::2, ::3],
        "reversed": base[::-1, ::-1],
        "broadcast": np.broadcast_to(np.float32(3), (5, 5)),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 7), np.int8),
        "big": base.astype(">f4"),
        "bf16": base.astype(ml_dtypes.bfloat16).T,
        "bool": base > 3,
    }
    path = tmp_path / "written.safetensors"
    serialize(path, [as_bytes(name, array) for name, array in arrays.items()], {"a": "1"})
    assert oct(path.stat().st_mode & 0o777) == "0o644"
    with safe_open(path, "np") as file:
        assert file.metadata() == {"a": "1"}
        for name, array in arrays.items():
            assert np.array_equal(file.get_tensor(name), array), name
    first = path.read_bytes()
    serialize(path, [as_bytes(name, array) for name, array in arrays.items()], {"a": "1"})
    assert path.read_bytes() == first


def test_fingerprints_tell_weights_apart_wherever_they_lie(tmp_path):
    tensors = small_tensors()
    one = open_checkpoint(write_model(tmp_path / "one.safetensors", tensors)).fingerprint
    (tmp_path / "m").mkdir()
    names = list(tensors)
    for shard, part in (("a", names[:3]), ("b", names[3:])):
        path = tmp_path / "m" / f"{shard}.safetensors"
        write_model(path, {name: tensors[name] for name in part})
    weight_map = {name: f"{'a' if name in names[:3] else 'b'}.safetensors" for name in names}
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(tmp_path / "m").fingerprint == one
    tensors["positions"] = tensors["positions"] + 1
    assert open_checkpoint(write_model(tmp_path / "two.safetensors", tensors)).fingerprint != one


# ---- bad files ----


def test_headers_beyond_the_cap_are_refused_unread(tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(PtqError, match="allowed"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path):
    path = write_model(tmp_path / "m.safetensors", small_tensors())
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(PtqError, match="changed while it was read"):
        checkpoint.read("lm_head.weight")


WORDS = [
    *("-1", "-0", "0", "1", "8", "16", "9007199254740993", "4611686018427387904"),
    *("18446744073709551615", "18446744073709551616", "1.0", "1e3", "true", "null", '""', "[]"),
    *("{}", "NaN", '"F16"', '"F64"', '"BF16"', '"f32"', '"shape"', '"\\u0000"', '"\\ud800"'),
    *('"a"', "[1]", "[0,2]", "//", " ", "\t", "\x00", "\x7f", "\xe9", "\ufeff"),
]


def mutant(rng: random.Random, text: str, data: bytes) -> bytes:
    """The file, changed in one to three places: a token replaced, characters lost or doubled, a
    number nudged, the length or the data changed."""
    length = None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(7)
        place = rng.randrange(len(text))
        if kind == 0:
            text = text[:place] + text[place + 1 :]
        elif kind == 1:
            text = text[:place] + rng.choice(WORDS) + text[place:]
        elif kind == 2:
            tokens = [i for i, c in enumerate(text) if c in '0123456789"[]{}:,']
            place = rng.choice(tokens)
            text = text[:place] + rng.choice(WORDS) + text[place + 1 :]
        elif kind == 3:
            text = text[:place] + chr(rng.randrange(1, 256)) + text[place + 1 :]
        elif kind == 4:
            digits = [i for i, c in enumerate(text) if c.isdigit()]
            place = rng.choice(digits)
            text = text[:place] + str(rng.randrange(10)) + text[place + 1 :]
        elif kind == 5:
            length = max(0, len(text.encode()) + rng.choice((-9, -1, 1, 2, 1 << 40)))
        else:
            data = data[: rng.randrange(len(data) + 1)] + bytes(rng.randrange(3))
    return raw_safetensors(text.encode(), data, length=length)


def has_duplicates(content: bytes) -> bool:
    """Whether an object of the header has a key twice (the library takes the last one)."""
    found = []

    def hook(pairs):
        found.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    (length,) = struct.unpack("<Q", content[:8])
    try:
        json.loads(content[8 : 8 + length], object_pairs_hook=hook)
    except ValueError:
        return False
    return any(found)


def test_the_verdict_on_mutants_is_the_librarys(tmp_path):
    tensors = {
        "a.weight": np.zeros((2, 4), np.float32),
        "b": np.zeros((3,), np.int8),
        "e": np.zeros((0, 4), np.float16),
        "z.bias": np.ones((5,), np.float64),
    }
    content = safetensors(tensors, {"format": "pt"})
    (length,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + length].decode(), content[8 + length :]
    rng = random.Random(11)
    path = tmp_path / "mutant.safetensors"
    accepted = 0
    for number in range(MUTANTS):
        content = mutant(rng, text, data)
        overwrite(path, content)
        ours, theirs = verdict(path), librarys_verdict(path)
        accepted += ours
        twice = theirs and has_duplicates(content)
        assert ours == theirs or twice, (number, ours, theirs, content)
    assert 20 < accepted < MUTANTS / 2


def test_shapes_that_overflow(tmp_path):
    path = tmp_path / "s.safetensors"
    for shape in ([2**62, 2**62, 0], [0, 2**62], [2**63, 2], [2**32, 2**32], [0] * 10, [1] * 60):
        size = prod(shape) % 2**62
        entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, min(size, 1)]}
        path.write_bytes(raw_safetensors({"w": entry}, bytes(min(size, 1))))
        assert verdict(path) == librarys_verdict(path), shape


def test_the_model_of_these_tests_is_good(tmp_path):
    path = write_model(tmp_path / "m.safetensors", small_tensors())
    assert verdict(path) is librarys_verdict(path) is True
    assert list(read_model(path)) == list(open_checkpoint(path).tensors)
