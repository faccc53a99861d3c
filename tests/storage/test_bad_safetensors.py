"""Files that are no safetensors files, or whose header lies."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq, raw_safetensors, safetensors, small_activations, small_tensors
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("here")


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_FILES = {
    "empty": (b"", "not a safetensors file"),
    "text": (b"<!DOCTYPE html><html><body>Not found</body></html>", "not a safetensors file"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "git-lfs pointer",
    ),
    "pickle": (pickle.dumps({"a": np.ones(3)}), "not a safetensors file"),
    "cut": (safetensors(small_tensors())[:-1], "cut short"),
    "cut in the header": (safetensors(small_tensors())[:100], "cut short"),
    "longer": (safetensors(small_tensors()) + b"\0", "followed by other bytes"),
    "header of 4 GiB": (raw_safetensors({}, length=1 << 32), "not a safetensors file"),
    "not JSON": (raw_safetensors(b"{nothing}"), "not valid JSON"),
    "a list": (raw_safetensors([]), "not a JSON object"),
    "nested": (raw_safetensors(b"[" * 100_000), "JSON"),
    "latin-1": (raw_safetensors('{"ä": 1}'.encode("latin-1")), "not valid JSON"),
    "name twice": (
        raw_safetensors(b'{"w.weight": %s, "w.weight": %s}' % ((json.dumps(entry()).encode(),) * 2))
        + bytes(16),
        "w.weight",
    ),
    "a hole": (raw_safetensors({"w.weight": entry(offsets=(8, 24))}, bytes(24)), "w.weight"),
    "overlap": (
        raw_safetensors({"v": entry(), "w.weight": entry(offsets=(8, 24))}, bytes(24)),
        "w.weight",
    ),
    "negative": (raw_safetensors({"w.weight": entry(shape=(-2, -2))}, bytes(16)), "w.weight"),
    "mis-sized": (raw_safetensors({"w.weight": entry(shape=(2, 3))}, bytes(16)), "w.weight"),
    "huge": (raw_safetensors({"w.weight": entry(shape=(2**62, 2**62))}, bytes(16)), "w.weight"),
    "unknown dtype": (raw_safetensors({"w.weight": entry("F99")}, bytes(16)), "F99"),
    "dtype a list": (raw_safetensors({"w.weight": entry(["F32"])}, bytes(16)), "w.weight"),
    "dtype null": (raw_safetensors({"w.weight": entry(None)}, bytes(16)), "w.weight"),
    "shape of floats": (raw_safetensors({"w.weight": entry(shape=(2.0, 2))}), "w.weight"),
    "shape of truths": (
        raw_safetensors({"w.weight": entry(shape=(True, 4))}, bytes(16)),
        "w.weight",
    ),
    "entry a string": (raw_safetensors({"w.weight": "F32"}), "w.weight"),
    "entry empty": (raw_safetensors({"w.weight": {}}), "w.weight"),
    "metadata of numbers": (raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
    "half a surrogate": (
        raw_safetensors(b'{"\\ud800": %s}' % json.dumps(entry()).encode(), bytes(16)),
        "\\ud800",
    ),
    "no tensors": (raw_safetensors({}), "none of its 0 tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_are_no_safetensors(content, words):
    Path("bad.safetensors").write_bytes(content)
    refused("pack", "bad.safetensors", words=("bad.safetensors", words))


@pytest.mark.parametrize("command", ["gptq", "calibrate", "inspect"])
def test_each_command_reads_files_by_the_same_reader(command, tmp_path):
    Path("bad.safetensors").write_bytes(BAD_FILES["cut"][0])
    small_activations(tmp_path / "acts")
    source = [] if command == "inspect" else ["--activations", "acts"]
    refused(command, "bad.safetensors", *source, words=("bad.safetensors", "cut short"))


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "missing", "dangling"])
def test_models_that_are_no_regular_files(kind, job):
    path = Path("odd.safetensors")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nothing")
    elif kind == "device":
        path = Path("/dev/zero")
    before = os.listdir()
    outcome = ptq("pack", path)
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert str(path) in outcome.errors[0]
    assert os.listdir() == before


def test_dtypes_that_can_be_neither_rounded_nor_copied(job):
    header = {"w.weight": entry("F4", (8, 4), (0, 16))}
    Path("f4.safetensors").write_bytes(raw_safetensors(header, bytes(16)))
    refused("pack", "f4.safetensors", words=("f4.safetensors", "w.weight", "F4"))
