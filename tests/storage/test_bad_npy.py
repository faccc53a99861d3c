"""Activation files that are no arrays of numbers: refused in one line, and never run."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq
from tests.refusals import Q

pytestmark = pytest.mark.usefixtures("here")


def bad_npy(name):
    """A broken file for q_proj, and what the message says of it."""
    path = Path(f"acts/{Q}.npy")
    good = path.read_bytes()
    inputs = np.load(path)
    match name:
        case "text":
            path.write_text("0.5 0.25 0.125\n")
            return "not a .npy file"
        case "empty":
            path.write_bytes(b"")
            return "not a .npy file"
        case "object":
            np.save(path, np.array([[Canary()] * 32], object), allow_pickle=True)
            return "pickle"
        case "pickle":
            path.write_bytes(pickle.dumps(Canary()))
            return "not a .npy file"
        case "npz":
            with path.open("wb") as file:
                np.savez(file, a=inputs)
            return "npz"
        case "cut":
            path.write_bytes(good[:-1])
            return "cut short"
        case "trailing":
            path.write_bytes(good + b"\0")
            return "followed by other bytes"
        case "cut in the header":
            path.write_bytes(good[:40])
            return "header"
        case "a claim of 2**60 tokens":
            path.write_bytes(npy_header((2**60, 32)) + bytes(64))
            return "cut short"
        case "a claim of 32 GiB":
            path.write_bytes(npy_header((1 << 28, 32)) + bytes(64))
            return "cut short"
        case "negative":
            path.write_bytes(npy_header((-2, -3, 32)) + bytes(6 * 32 * 4))
            return "shape"
        case "a header of 4 GiB":
            path.write_bytes(b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{}")
            return "header"
        case "a nested header":
            text = b"(" * 60_000
            path.write_bytes(b"\x93NUMPY\2\0" + struct.pack("<I", len(text)) + text)
            return "header"
        case "version 9":
            path.write_bytes(b"\x93NUMPY\x09\0" + good[8:])
            return "9.0"
        case "zero tokens":
            np.save(path, inputs[:0])
            return "no tokens"
        case "1-D" | "0-D":
            np.save(path, inputs[0] if name == "1-D" else inputs[0, 0])
            return "shape"
        case "width":
            np.save(path, inputs[:, :31])
            return "31"
        case "folder":
            path.unlink()
            path.mkdir()
            np.save(path / "x.npy", inputs)
            return "no activations"
        case "fifo":
            path.unlink()
            os.mkfifo(path)
            return "not a regular file"
        case "dangling":
            path.unlink()
            path.symlink_to("nothing")
            return "No such file"
        case _:
            np.save(path, inputs.astype(name))
            return np.dtype(name).name


def npy_header(shape, descr="<f4"):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    text = text.ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self):
        return open, ("canary", "w")


BAD_NPY = [
    *("text", "empty", "object", "pickle", "npz", "cut", "trailing", "cut in the header"),
    *("a claim of 2**60 tokens", "a claim of 32 GiB", "negative", "a header of 4 GiB"),
    *("a nested header", "version 9", "zero tokens", "1-D", "0-D", "width", "folder", "fifo"),
    *("dangling", "int8", "uint16", "int64", "bool", "complex64", "U5", "S3", "V2"),
    *("M8[s]", "f4,f4"),
]


@pytest.mark.parametrize("kind", BAD_NPY)
def test_activations_that_are_none(kind, job):
    words = bad_npy(kind)
    where = Q if kind == "folder" else f"{Q}.npy"
    for command in ("calibrate", "gptq"):
        before = os.listdir()
        outcome = ptq(command, job, "--activations", "acts")
        assert outcome.code == 1
        assert len(outcome.errors) == 1
        assert where in outcome.errors[0]
        assert words in outcome.errors[0] or (kind, command) == ("folder", "gptq")
        assert os.listdir() == before
    assert not Path("canary").exists()
