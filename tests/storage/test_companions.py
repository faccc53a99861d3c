"""What a model folder holds beside its weights: copied in pieces, counted, and never weights."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from ptq_cli.errors import FileError
from ptq_cli.storage import companions
from ptq_cli.storage.files import copy_file
from tests.builders import SAMPLE, half_sample, ptq, tree

WEIGHTS = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt",
    "flax_model.msgpack", "flax_model.msgpack.index.json", "tf_model.h5", "last.ckpt",
    "rust_model.ot", "model.tflite", "model.onnx", "model.onnx_data", "model.onnx.data",
    "model.mlmodel", "q4.gguf", "MODEL.BIN", "acts.npy", "acts.npz",
)  # fmt: skip
COMPANIONS = ("LICENSE", "merges.txt", "tokenizer.model", "modeling_own.py", "preprocessor.json")


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    return half_sample(tmp_path_factory.mktemp("block") / "model", blocks=1)


@pytest.fixture
def model(block, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.copy(block / name, folder / name)
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


# ---- sub-folders ----

INSIDE = {
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
    "1_Pooling/config.json": b'{"word_embedding_dimension": 128}',
    "own_code/__init__.py": b"",
    "own_code/deep/er/modeling.py": b"import torch",
    "assets/voice.wav": os.urandom(300),
}
STAYING = {  # weights, hidden files, caches, folders that runs work in or have made
    "assets/extra.bin": b"w", "onnx/model.onnx": b"w", "checkpoint-5/model.safetensors": b"w",
    "own_code/__pycache__/modeling.pyc": b"c", ".git/config": b"g", "assets/.DS_Store": b"d",
    "out2.partial/job.json": b"{}", "earlier/quantization.json": b"{}", "earlier/tokenizer": b"t",
}  # fmt: skip


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def copied(out):
    """Files in sub-folders of an output, by name."""
    return {name: content for name, content in tree(out).items() if os.sep in name}


RUNS = {
    "rtn": ("rtn",),
    "pack": ("pack",),
    "a foreign format": ("rtn", "--format", "compressed-tensors"),
    "gptq": ("gptq", "--activations", SAMPLE / "activations", "--sweeps", 0, "--refine", 0),
    "smoothed floats": ("smoothquant", "--bits", 16, "--activations", SAMPLE / "activations"),
}


@pytest.mark.parametrize("run", RUNS)
def test_sub_folders_come_along(run, model, tmp_path):
    put(model, INSIDE | STAYING)
    command, *options = RUNS[run]
    again = (command, model, *options, "-o", tmp_path / "out")
    assert ptq(*again).code == 0
    assert copied(tmp_path / "out") == INSIDE
    outcome = ptq(*again)
    assert (outcome.code, "finished already" in outcome.err) == (0, True)
    made = json.loads((tmp_path / "out" / "ptq_job.json").read_text())
    assert INSIDE.keys() <= made["files"].keys()


def test_sub_folders_of_what_is_repacked_come_along(model, tmp_path):
    put(model, INSIDE)
    assert ptq("rtn", model, "--format", "gptq", "-o", tmp_path / "first").code == 0
    assert ptq("pack", tmp_path / "first", "--format", "gptq_v2", "-o", tmp_path / "out").code == 0
    assert copied(tmp_path / "out") == INSIDE


def test_a_changed_or_lost_companion_is_noticed(model, tmp_path):
    put(model, INSIDE)
    again = ("rtn", model, "-o", tmp_path / "out")
    assert ptq(*again).code == 0
    copy = tmp_path / "out" / "1_Pooling" / "config.json"
    copy.write_bytes(copy.read_bytes().replace(b"128", b"129"))
    outcome = ptq(*again)
    assert (outcome.code, "1_Pooling/config.json" in outcome.errors[0]) == (1, True)
    copy.unlink()
    assert "1_Pooling/config.json is missing" in ptq(*again).errors[0]
    assert ptq(*again, "--force").code == 0
    put(model, {"1_Pooling/config.json": b"{}"})
    assert "another 1_Pooling/config.json" in ptq(*again).errors[0]


def test_an_output_inside_the_model_folder(model, monkeypatch):
    put(model, INSIDE)
    monkeypatch.chdir(model)
    for command in ("rtn", "pack"):
        assert ptq(command, ".", "-o", command).code == 0
        assert copied(model / command) == INSIDE


def test_links(model, tmp_path):
    """Followed to files of the model; what leads out of it, and folders, are named and stay."""
    put(tmp_path, {"secret/key": b"secret", "shared/config.json": b"{}"})
    put(model, {"assets/real.txt": b"real"})
    (model / "assets/link.txt").symlink_to("real.txt")
    (model / "assets/key").symlink_to(tmp_path / "secret/key")
    (model / "assets/nowhere").symlink_to("nothing")
    (model / "assets/loop").symlink_to(model)
    (model / "2_Dense").symlink_to(tmp_path / "shared")
    (model / "LICENSE").symlink_to(tmp_path / "secret/key")
    os.mkfifo(model / "assets/pipe")
    outcome = ptq("rtn", model, "-o", tmp_path / "out")
    assert outcome.code == 0
    real = {"assets/real.txt": b"real", "assets/link.txt": b"real"}
    assert copied(tmp_path / "out") == real
    assert not (tmp_path / "out/assets/link.txt").is_symlink()
    said = "\n".join(outcome.warnings)
    assert "assets/key (a link that leads out of the model folder)" in said
    assert "assets/loop" in said
    assert "2_Dense" in said
    outcome = ptq("rtn", model, "-o", tmp_path / "new", "--strict")
    assert (outcome.code, "not copied: " in outcome.errors[0]) == (1, True)


def test_a_snapshot_of_the_hubs_cache(model, tmp_path):
    """Its files are links to blobs beside the snapshots."""
    put(model, INSIDE)
    cache = tmp_path / "models--somebody--own"
    for number, (name, content) in enumerate(sorted(tree(model).items())):
        blob, link = cache / "blobs" / f"b{number}", cache / "snapshots" / "main" / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    outcome = ptq("rtn", cache / "snapshots" / "main", "-o", tmp_path / "out")
    assert (outcome.code, outcome.warnings) == (0, [])
    assert copied(tmp_path / "out") == INSIDE


def test_modules_of_sentence_transformers_keep_their_weights(model, tmp_path):
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    dense = {"2_Dense/model.safetensors": b"weights", "2_Dense/config.json": b"{}"}
    put(model, INSIDE | dense | {"other/model.bin": b"weights"})
    for text in (json.dumps(modules), "[", "[1]", '{"path": "other"}'):
        (model / "modules.json").write_text(text)
        assert ptq("rtn", model, "-o", tmp_path / "out", "--force").code == 0
        whole = text == json.dumps(modules)
        assert copied(tmp_path / "out") == {
            name: content
            for name, content in (INSIDE | dense).items()
            if whole or not name.endswith(".safetensors")
        }


def test_a_sub_folder_that_cannot_be_read(model, tmp_path, monkeypatch):
    put(model, INSIDE)
    real = companions.listing

    def listing(folder):
        if folder.name == "assets":
            raise FileError(f"{folder}: Permission denied")
        return real(folder)

    monkeypatch.setattr(companions, "listing", listing)
    outcome = ptq("rtn", model, "-o", tmp_path / "out")
    assert outcome.code == 0
    assert any("assets (it cannot be read)" in line for line in outcome.warnings)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_sub_folders_count_where_space_is_checked(model, tmp_path, monkeypatch, more):
    (model / "assets").mkdir()
    with open(model / "assets/movie.mp4", "wb") as file:
        file.truncate(1 << 30)
    real = os.statvfs(tmp_path)
    few = type("Few", (), {"f_bavail": (1 << 30) // real.f_frsize, "f_frsize": real.f_frsize})
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    outcome = ptq("rtn", model, "-o", tmp_path / "out", *more)
    assert (outcome.code, "MB are needed" in outcome.errors[0]) == (1, True)
