"""Twenty thousand mutants of valid files each: only our errors, and safetensors' own verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, deserialize

from ptq_cli.errors import PtqError
from ptq_cli.storage.checkpoint import open_checkpoint, read_header
from ptq_cli.storage.npy import open_npy
from tests.builders import overwrite, safetensors

pytestmark = pytest.mark.slow

MUTANTS = 20_000
WORDS = [b"0", b"-1", b"1e3", b"18446744073709551616", b"null", b"[]", b"{}", b'"', b"\xff"]
WORDS += [b"F32", b"BF16", b"__metadata__", b'"a"', b"4294967296", b"true", b",", b":"]


def mutants(
    seed: bytes,
    rng: np.random.Generator,
    upto: int,
    words: Sequence[bytes] = WORDS,
    count: int = MUTANTS,
):
    """Bits flipped, bytes replaced, cut out, put in; most in the first `upto` bytes."""
    for _ in range(count):
        content = bytearray(seed)
        for _ in range(int(rng.integers(1, 4))):
            place = int(
                rng.integers(0, min(upto, len(content)) if rng.random() < 0.9 else len(content))
            )
            kind = int(rng.integers(0, 6))
            if kind == 0:
                content[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                content[place] = int(rng.integers(256))
            elif kind == 2:
                del content[place : place + int(rng.integers(1, 9))]
            elif kind == 3:
                content[place:place] = words[int(rng.integers(len(words)))]
            elif kind == 4:
                word = words[int(rng.integers(len(words)))]
                content[place : place + len(word)] = word
            else:
                content = content[: int(rng.integers(1, len(content) + 1))]
            if not content:
                break
        yield bytes(content)


def refused(function, path) -> str | None:
    """Our own error's words, None where it was accepted; anything else fails the test."""
    try:
        function(path)
    except PtqError as error:
        assert str(path) in str(error)  # noqa: PT017
        return str(error)
    return None


def test_safetensors(tmp_path):
    seed = safetensors(
        {
            "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
            "b": np.arange(6).astype(ml_dtypes.bfloat16),
            "c": np.zeros((), np.int64),
        },
        {"format": "pt"},
    )
    header = 8 + int.from_bytes(seed[:8], "little")
    path = tmp_path / "m.safetensors"
    accepted = 0
    for content in mutants(seed, np.random.default_rng(0), header):
        overwrite(path, content)
        ours = refused(read_header, path)
        try:
            deserialize(content)
            theirs = None
        except SafetensorError as error:
            theirs = str(error)
        if ours and "stands twice" in ours:
            continue  # the library takes the last of two
        assert (ours is None) == (theirs is None), (content, ours, theirs)
        accepted += ours is None
    assert 100 < accepted < MUTANTS - 100


def test_npy(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(24, dtype=np.float16).reshape(4, 6))
    seed = path.read_bytes()
    accepted = 0
    for content in mutants(seed, np.random.default_rng(1), 128):
        overwrite(path, content)
        if refused(open_npy, path) is None:
            accepted += 1
            assert open_npy(path).size + open_npy(path).offset == len(content)
    assert 100 < accepted < MUTANTS - 100


def test_index(tmp_path):
    (tmp_path / "one.safetensors").write_bytes(safetensors({"a": np.ones(3, np.float32)}))
    (tmp_path / "two.safetensors").write_bytes(safetensors({"b": np.ones(3, np.float32)}))
    index = {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
    }
    seed = json.dumps(index).encode()
    path = tmp_path / "model.safetensors.index.json"

    def opened(path):
        checkpoint = open_checkpoint(path)
        assert {stored.file.parent for stored in checkpoint.tensors.values()} == {tmp_path}

    verdicts = []
    for content in mutants(seed, np.random.default_rng(2), len(seed)):
        overwrite(path, content)
        try:
            opened(path)
            verdicts.append(True)
        except PtqError:
            verdicts.append(False)
    assert 100 < sum(verdicts) < MUTANTS - 100
