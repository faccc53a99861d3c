"""What a model folder holds beside its weights: copied in pieces, counted, and never weights."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from ptq_cli.errors import FileError
from ptq_cli.storage.files import copy_file
from tests.builders import SAMPLE, ptq

WEIGHTS = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt",
    "flax_model.msgpack", "flax_model.msgpack.index.json", "tf_model.h5", "last.ckpt",
    "rust_model.ot", "model.tflite", "model.onnx", "model.onnx_data", "model.onnx.data",
    "model.mlmodel", "q4.gguf", "MODEL.BIN", "acts.npy", "acts.npz",
)  # fmt: skip
COMPANIONS = ("LICENSE", "merges.txt", "tokenizer.model", "modeling_own.py", "preprocessor.json")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.copy(SAMPLE / name, folder / name)
    return folder


def test_weights_of_other_frameworks_are_not_copied(model, tmp_path):
    for name in (*WEIGHTS, *COMPANIONS):
        (model / name).write_bytes(os.urandom(100))
    assert ptq("rtn", model, "-o", tmp_path / "out").code == 0
    made = set(os.listdir(tmp_path / "out"))
    assert not made & set(WEIGHTS)
    for name in COMPANIONS:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_a_file_is_copied_in_pieces(tmp_path):
    size = 20 << 20
    (tmp_path / "large").write_bytes(os.urandom(size))
    tracemalloc.start()
    copy_file(tmp_path / "large", tmp_path / "copy")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "large").read_bytes()
    with pytest.raises(FileError, match="absent"):
        copy_file(tmp_path / "absent", tmp_path / "copy")
    with pytest.raises(FileError, match="nowhere/copy"):
        copy_file(tmp_path / "large", Path(tmp_path, "nowhere/copy"))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_companions_count_where_space_is_checked(model, tmp_path, monkeypatch, more):
    with open(model / "movie.mp4", "wb") as file:
        file.truncate(1 << 30)
    real = os.statvfs(tmp_path)
    few = type("Few", (), {"f_bavail": (1 << 30) // real.f_frsize, "f_frsize": real.f_frsize})
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    outcome = ptq("rtn", model, "-o", tmp_path / "out", *more)
    assert outcome.code == 1
    assert "MB are needed, 1073.7 MB free" in outcome.errors[0]
    assert os.listdir(tmp_path) == ["model"]
    (model / "movie.mp4").unlink()
    assert ptq("rtn", model, "-o", tmp_path / "out", *more).code == 0
