"""Mutants of GGUF files and of importance matrices: only our errors, soon, and in little memory.

MUTANTS=20000 in the environment makes so many of each instead of a few.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.commands.quantize import prepare
from ptq_cli.errors import PtqError
from ptq_cli.storage.gguf_file import read_gguf_header
from ptq_cli.storage.imatrix import read_imatrix
from ptq_cli.storage.quantized import open_quantized
from tests.attacks.test_mutants import mutants
from tests.builders import overwrite, ptq
from tests.calibration.test_imatrix import importance, write_imatrix, write_old_imatrix
from tests.storage.gguf_files import tensors, write_gguf_file, write_unknown_gguf

gguf = pytest.importorskip("gguf")

COUNT, SECONDS, MEMORY = int(os.environ.get("MUTANTS", "60")), 2.0, 200 << 20
WORDS = [struct.pack("<Q", number) for number in (0, 1, 2**24, 2**32, 2**60, 2**64 - 1)]
WORDS += [struct.pack("<I", number) for number in (0, 1, 2, 5, 8, 9, 12, 99, 2**31, 2**32 - 1)]
WORDS += [b"general.alignment", b"\xff", b"GGUF", struct.pack("<IQ", 9, 9), b"weight", b"blk.0."]
# Lets a rounding begin, on whatever the mutant says it is.
WAYS: list[dict[str, Any]] = [
    {"format": "gguf", "bits": 4, "group_size": 32, "on_misfit": "keep"},
    {"scheme": "Q4_K_M", "on_misfit": "keep"},
    {"format": "ptq", "group_size": 4},
]


@pytest.fixture(autouse=True)
def _here(here):
    """Every test in a folder of its own."""


def survived(path: Path, contents: Iterator[bytes], way: Callable[[Path, int], Any]) -> int:
    """How many were accepted; whatever is no error of ours, takes long, or much memory, fails."""
    accepted = 0
    for number, content in enumerate(contents):
        overwrite(path, content)
        begin = time.process_time()
        tracemalloc.start()
        try:
            way(path, number)
            accepted += 1
        except PtqError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in error.message  # noqa: PT017
            assert len(str(error)) < 1000  # noqa: PT017
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert most < MEMORY
        assert time.process_time() - begin < SECONDS
    return accepted


def planned(path: Path, number: int) -> None:
    """As far as a command goes before its work."""
    prepare("rtn", path, WAYS[number % len(WAYS)], output="out")


def inspected(path: Path, number: int) -> None:
    if any(tensor.spec.dtype.startswith("Q") for tensor in read_gguf_header(path).tensors):
        open_quantized(path)


@pytest.mark.parametrize("known", [True, False])
def test_models(known: bool) -> None:
    if known:
        write_gguf_file(Path("seed.gguf"), tensors())
    else:
        write_unknown_gguf(Path("seed.gguf"))
    seed, rng = Path("seed.gguf").read_bytes(), np.random.default_rng(known)
    header = read_gguf_header(Path("seed.gguf")).tensors[0].offset
    found = survived(Path("m.gguf"), mutants(seed, rng, header, WORDS, COUNT), planned)
    assert COUNT // 100 <= found < COUNT


def test_outputs() -> None:
    write_unknown_gguf(Path("m.gguf"))
    pack = ("pack", "m.gguf", "--format", "gguf", "-b", 4, "-g", 32, "-o", "out.gguf")
    assert ptq(*pack).code == 0
    seed = Path("out.gguf").read_bytes()
    header = read_gguf_header(Path("out.gguf")).tensors[0].offset
    rng = np.random.default_rng(3)
    found = survived(Path("n.gguf"), mutants(seed, rng, header, WORDS, COUNT), inspected)
    assert COUNT // 100 <= found < COUNT


def test_shards() -> None:
    write_unknown_gguf(Path("m.gguf"))
    pack = ("pack", "m.gguf", "--format", "gguf", "-b", 4, "-g", 32, "--max-shard-size", "15KB")
    assert ptq(*pack, "-o", "out").code == 0
    paths = sorted(Path("out").glob("model-*.gguf"))
    for number, path in enumerate(paths):
        seed = path.read_bytes()
        header = read_gguf_header(paths[0]).tensors[0].offset if number == 0 else 400
        rng = np.random.default_rng(number)
        contents = mutants(seed, rng, header, WORDS, COUNT // len(paths))

        def opened(_: Path, number: int) -> None:
            open_quantized(Path("out"))

        try:
            survived_in_folder(path, contents, opened)
        finally:
            path.write_bytes(seed)


def survived_in_folder(path: Path, contents: Iterator[bytes], way: Any) -> None:
    """As `survived`, where an error may name another shard."""
    for content in contents:
        overwrite(path, content)
        try:
            way(path, 0)
        except PtqError as error:
            assert "out" in str(error)  # noqa: PT017


@pytest.mark.parametrize("write", [write_imatrix, write_old_imatrix])
def test_importance_matrices(write: Callable[..., None]) -> None:
    write("seed.gguf", importance())
    seed = Path("seed.gguf").read_bytes()
    rng, upto = np.random.default_rng(7), 500 if write is write_imatrix else len(seed)

    def read(path: Path, number: int) -> None:
        for entry in itertools.islice(read_imatrix(path).values(), 20):
            entry.sums()

    found = survived(Path("i.gguf"), mutants(seed, rng, upto, WORDS, COUNT), read)
    assert COUNT // 100 <= found < COUNT
