"""What a hostile user gets: one line that names the file and the tensor, exit code 1, nothing
written, an older output untouched. And what looks bad but is not an error.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import ptq_cli
from tests.builders import (
    LINEARS,
    OUTPUT,
    Outcome,
    ptq,
    random_inputs,
    random_weight,
    raw_safetensors,
    read_model,
    safetensors,
    small_activations,
    small_model,
    small_tensors,
    tree,
    write_model,
)

Q = "layers.0.q_proj"
DOWN = "layers.0.down_proj"


def refused(*arguments: object, words: tuple[str, ...] = (), code: int = 1) -> Outcome:
    """Run a command that must fail: one line, that holds all `words`; nothing written, but for
    finished units, which it then speaks of and which are removed here."""
    before = tree(Path())
    outcome = ptq(*arguments)
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert len(outcome.errors) == 1, outcome.err
    assert [line for line in outcome.err.splitlines() if not line.startswith("ptq: ")] == []
    assert "internal error" not in outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.errors[0]
    kept = [name for name in os.listdir() if name.endswith(".partial")]
    assert bool(kept) == ("finished unit" in outcome.errors[0])
    for name in kept:
        assert not Path(name, "out").exists()
        shutil.rmtree(name)
    assert tree(Path()) == before
    return outcome


def gptq_refused(model: object, *options: object, words: tuple[str, ...]) -> Outcome:
    """The same for gptq, with an older output that must survive it, replaced or not."""
    Path("old").mkdir()
    Path("old/model.safetensors").write_text("older output")
    Path("old/quantization.json").write_text("{}")
    refused("gptq", model, "--activations", "acts", "-o", "old", "--force", *options, words=words)
    return refused("gptq", model, "--activations", "acts", "-o", "new", *options, words=words)


# ---- weights ----


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
@pytest.mark.parametrize("command", ["gptq", "pack", "calibrate"])
def test_files_that_are_no_safetensors(command, content, words, tmp_path):
    Path("bad.safetensors").write_bytes(content)
    small_activations(tmp_path / "acts")
    source = [] if command == "pack" else ["--activations", "acts"]
    if words.startswith("none of") and command == "calibrate":
        words = "no activations for 0 linears"
        refused(command, "bad.safetensors", *source, words=(words,))
    else:
        refused(command, "bad.safetensors", *source, words=("bad.safetensors", words))


def test_a_bad_older_output_and_a_bad_original_are_refused_by_eval(job):
    ptq("pack", job, "-o", "out")
    Path("bad.safetensors").write_bytes(b"text that is long enough")
    refused("eval", "bad.safetensors", "out", words=("bad.safetensors",))
    refused("eval", job, "bad.safetensors", words=("bad.safetensors",))
    refused("eval", job, job, words=("model.safetensors", "not a quantized checkpoint"))
    refused("eval", "out", "out", words=("out", "no tensor 'layers.0."))
    refused("eval", job, "nowhere", words=("nowhere", "No such file"))


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers(value, dtype, job):
    weight = random_weight(*LINEARS[Q], dtype=dtype)
    weight[3, 5] = weight[4, 0] = value
    small_model(job, **{f"{Q}.weight": weight})
    gptq_refused(job, words=("model.safetensors", f"{Q}.weight", "[12, 32]", "[3, 5]", "2 in all"))


@pytest.mark.parametrize("group_size", ["128", "-1", "0", "5"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7F800000, 0xFF800000, 0xFFC00001])
def test_plain_rounding_reads_row_by_row_and_sees_them_too(bits, group_size, job):
    """Quiet and signalling NaN of both signs, inf: no warning of NumPy's, one line."""
    weight = random_weight(*LINEARS[Q], dtype=np.float32)
    weight.view(np.uint32)[3, 5] = bits
    small_model(job, **{f"{Q}.weight": weight})
    words = ("model.safetensors", f"{Q}.weight", "[12, 32]", "[3, 5]", "1 in all")
    for more in ([], ["--asym"], ["--scale-dtype", "float32"]):
        refused("rtn", job, "--no-mse", "--group-size", group_size, *more, words=words)


@pytest.mark.parametrize("command", ["gptq", "rtn"])
def test_weights_whose_squares_do_not_fit_float32(command, job):
    weight = random_weight(*LINEARS[Q], dtype=np.float32) * np.float32(1e30)
    small_model(job, **{f"{Q}.weight": weight})
    words = (f"{Q}.weight", "[12, 32]", "too large", "--ignore")
    source = ["--activations", "acts"] if command == "gptq" else ["--no-mse"]
    refused(command, job, *source, "--scale-dtype", "float32", words=words)


def test_weights_beyond_float32(job):
    weight = random_weight(*LINEARS[Q], dtype=np.float64)
    weight[1, 2] = 1e300
    small_model(job, **{f"{Q}.weight": weight})
    gptq_refused(job, words=("model.safetensors", f"{Q}.weight", "[1, 2]", "too large for float32"))


@pytest.mark.parametrize("command", ["gptq", "rtn", "pack"])
@pytest.mark.parametrize("symmetry", ["--sym", "--asym"])
def test_weights_whose_scale_does_not_fit_its_dtype(command, symmetry, job):
    small_model(job, **{f"{Q}.weight": random_weight(12, 32, dtype=np.float32) * np.float32(1e10)})
    source = [] if command == "pack" else ["--activations", "acts"]
    words = (f"{Q}.weight", "[12, 32]", "float16", "--scale-dtype float32")
    refused(command, job, symmetry, *source, words=words)
    assert ptq(command, job, symmetry, *source, "--scale-dtype", "float32").code == 0


def test_a_model_that_is_quantized_already(job):
    ptq("pack", job, "-o", "out")
    refused("gptq", "out", words=("out", "quantized already", ".qweight"))
    refused("calibrate", "out", "--activations", "acts", words=("out", "quantized already"))
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    Path("m/config.json").write_text('{"quantization_config": {"bits": 4}}')
    refused("gptq", "m", words=("m", "quantization_config"))


def test_dtypes_that_can_be_neither_rounded_nor_copied(job):
    header = {"w.weight": entry("F4", (8, 4), (0, 16))}
    Path("f4.safetensors").write_bytes(raw_safetensors(header, bytes(16)))
    refused("pack", "f4.safetensors", words=("f4.safetensors", "w.weight", "F4"))


def test_a_name_that_packing_would_take_from_another_tensor(job):
    """`w.weight` becomes w.qweight, w.scales and w.zeros; the model's own w.scales is not lost."""
    tensors = {"w.weight": random_weight(4, 8), "w.scales": np.ones(3, np.float32)}
    write_model(Path("own.safetensors"), tensors)
    refused("pack", "own.safetensors", words=("own.safetensors", "w.scales"))


def test_two_tensors_that_would_become_one_module(job):
    tensors = {"w.weight": random_weight(4, 8), "w": random_weight(4, 8)}
    write_model(Path("two.safetensors"), tensors)
    refused("pack", "two.safetensors", "--include", "^w$", words=("'w'",))


# ---- indexes and folders ----


def shards(weight_map=None, first=(Q,), second=(DOWN,), index=None):
    tensors = small_tensors()
    Path("m").mkdir()
    for number, names in enumerate((first, second)):
        part = {f"{name}.weight": tensors[f"{name}.weight"] for name in names}
        write_model(Path(f"m/{'ab'[number]}.safetensors"), part)
    if weight_map is None:
        weight_map = {f"{Q}.weight": "a.safetensors", f"{DOWN}.weight": "b.safetensors"}
    content = json.dumps({"weight_map": weight_map}) if index is None else index
    Path("m/model.safetensors.index.json").write_text(content)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/a.safetensors", "C:\\a.safetensors", ".", "a.bin", "", 5]
)  # fmt: skip
def test_shards_are_plain_names(shard):
    shards({f"{Q}.weight": shard})
    refused("pack", "m", words=(INDEX, f"{Q}.weight", "plain name"))


def test_a_missing_shard(job):
    shards()
    Path("m/b.safetensors").unlink()
    refused("pack", "m", words=(INDEX, "b.safetensors", "1 of 2"))


def test_a_shard_without_its_tensor():
    shards({f"{Q}.weight": "a.safetensors", f"{DOWN}.weight": "a.safetensors"})
    refused("pack", "m", words=(INDEX, f"{DOWN}.weight"))


@pytest.mark.parametrize("home", ["a.safetensors", "b.safetensors"])
def test_a_tensor_in_two_shards(home):
    weight_map = {f"{Q}.weight": home, f"{DOWN}.weight": "b.safetensors"}
    weight_map |= {"layers.0.o_proj.weight": "a.safetensors"}
    shards(weight_map, first=(Q, "layers.0.o_proj"), second=(DOWN, Q))
    refused("pack", "m", words=(INDEX, f"{Q}.weight", "a.safetensors", "b.safetensors"))


def test_a_tensor_that_the_index_does_not_know_is_a_warning():
    shards(first=(Q, "layers.0.o_proj"))
    outcome = ptq("pack", "m", "-o", "out")
    assert outcome.code == 0
    assert any("layers.0.o_proj.weight" in line for line in outcome.warnings)
    assert "layers.0.o_proj.weight" not in read_model(Path("out/model.safetensors"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000,
     '{"weight_map": {"a": "a.safetensors", "a": "a.safetensors"}}'],
    ids=["empty", "list", "nothing", "map a list", "map empty", "nested", "twice"],
)  # fmt: skip
def test_an_index_that_is_none(content):
    shards(index=content)
    refused("pack", "m", words=(INDEX,))


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_config_that_is_none(content, job):
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    Path("m/config.json").write_text(content)
    refused("pack", "m", words=("config.json",))


def test_folders_without_weights_or_with_too_many():
    Path("m").mkdir()
    refused("pack", "m", words=("m", "no .safetensors file"))
    for name in "ab":
        small_model(Path(f"m/{name}.safetensors"))
    refused("pack", "m", words=("a.safetensors, b.safetensors",))


# ---- activations ----


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


def test_both_widths_are_named(job):
    np.save(f"acts/{Q}.npy", random_inputs(50, 31))
    words = (f"{Q}.npy", "[50, 31]", "31", f"{Q}.weight", "[12, 32]", "32")
    refused("calibrate", job, "--activations", "acts", words=words)
    gptq_refused(job, words=words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 7, 50, 95])  # 7 and 95 are held out
def test_activations_that_are_no_numbers(value, token, job):
    inputs = random_inputs(96, 32)
    inputs[token, 9] = value
    np.save(f"acts/{Q}.npy", inputs)
    words = (f"{Q}.npy", "[96, 32]", f"token {token}", "channel 9")
    refused("calibrate", job, "--activations", "acts", words=words)
    gptq_refused(job, words=words)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_place_in_shards_is_a_place_in_its_file(job, order):
    inputs = random_inputs(96, 32).reshape(3, 32, 32)
    inputs[2, 1, 4] = np.nan
    Path(f"acts/{Q}.npy").unlink()
    Path(f"acts/{Q}").mkdir()
    for i in range(3):
        np.save(f"acts/{Q}/{i}.npy", np.array(inputs[i], order=order))
    words = ("2.npy", "[32, 32]", "token 1", "channel 4")
    refused("calibrate", job, "--activations", "acts", words=words)


@pytest.mark.parametrize("big", [1e300, -1e39])
def test_activations_beyond_float32(job, big):
    inputs = random_inputs(96, 32, dtype=np.float64)
    inputs[4, 2] = big
    np.save(f"acts/{Q}.npy", inputs)
    refused("calibrate", job, "--activations", "acts", words=(f"{Q}.npy", "token 4", "channel 2"))


@pytest.mark.parametrize("big", [1e25, 3e38])
def test_activations_whose_squares_overflow(job, big):
    inputs = random_inputs(96, 32, dtype=np.float32)
    inputs[:] = big
    np.save(f"acts/{Q}.npy", inputs)
    refused("calibrate", job, "--activations", "acts", words=(Q, "overflow"))


def test_missing_and_surplus_activations_are_both_listed(job):
    Path(f"acts/{DOWN}.npy").rename("acts/layers.0.down_prj.npy")
    words = (DOWN, "layers.0.down_prj", "acts")
    refused("calibrate", job, "--activations", "acts", words=words)
    gptq_refused(job, words=words)


def test_shards_of_different_widths(job):
    Path(f"acts/{Q}.npy").unlink()
    Path(f"acts/{Q}").mkdir()
    for i, width in enumerate((32, 31)):
        np.save(f"acts/{Q}/{i}.npy", random_inputs(10, width))
    refused("calibrate", job, "--activations", "acts", words=("0.npy", "32", "1.npy", "31"))


@pytest.mark.parametrize("every", [1, 2])
def test_holding_everything_out_leaves_no_tokens(job, every):
    inputs = random_inputs(96, 32)[: 1 if every == 1 else 2]
    np.save(f"acts/{Q}.npy", inputs)
    outcome = ptq("calibrate", job, "--activations", "acts", "--heldout-every", every)
    assert outcome.code == (1 if every == 1 else 0)
    if every == 1:
        assert "no tokens" in outcome.errors[0]
        assert not Path("model.calibration.safetensors").exists()


def test_activations_that_are_nowhere(job):
    refused("gptq", job, "--activations", "nowhere", words=("nowhere", "No such file"))
    refused("calibrate", job, words=("model.safetensors", "--activations DIR"))


def test_a_calibration_and_activations_exclude_each_other(job):
    ptq("calibrate", job, "--activations", "acts")
    stats = "model.calibration.safetensors"
    arguments = ["gptq", job, "--calibration", stats, "--activations", "acts"]
    refused(*arguments, words=(stats, "acts"))


# ---- statistics files ----


def test_a_calibration_of_another_model(job):
    assert ptq("calibrate", job, "--activations", "acts", "-o", "c.safetensors").code == 0
    small_model(job, **{f"{Q}.weight": random_weight(12, 32, seed=9)})
    for command in ("gptq", "rtn"):
        words = ("c.safetensors", "another model", "model.safetensors")
        refused(command, job, "--calibration", "c.safetensors", words=words)
    refused("calibrate", job, "--merge", "c.safetensors", words=("c.safetensors", "another model"))


def test_a_model_is_no_statistics_file(job):
    words = ("model.safetensors", "not a statistics file")
    refused("gptq", job, "--calibration", job, words=words)


def changed_statistics(change):
    """c.safetensors with its content changed by `change(content, tensors)`."""
    path = Path("c.safetensors")
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    content = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["ptq"])
    dtypes = {"F32": np.float32, "I64": np.int64, "F16": np.float16}
    tensors = {
        name: np.frombuffer(data, dtypes[dtype]).reshape(shape).copy()
        for name, (dtype, shape, data) in read_model(path).items()
    }
    content = change(content, tensors) or content
    text = content if isinstance(content, str) else json.dumps(content)
    write_model(path, tensors, {"ptq": text})


def without(key):
    def change(content, tensors):
        content["sites"][Q].pop(key)

    return change


def setting(key, value):
    def change(content, tensors):
        content["sites"][Q][key] = value

    return change


def tensor(part, value):
    def change(content, tensors):
        if value is None:
            del tensors[f"{Q}.{part}"]
        else:
            tensors[f"{Q}.{part}"] = value(tensors[f"{Q}.{part}"])

    return change


def spoiled(array):
    array[0] = np.nan
    return array


BROKEN_STATISTICS = {
    **{f"without {key}": without(key) for key in (
        "linears", "n_tokens", "n_seen", "min", "max", "mean", "std", "histogram_start")},
    **{f"without {part}": tensor(part, None) for part in (
        "hessian", "absmax", "absmean", "histogram", "heldout")},
    "no content": lambda content, tensors: "{}",
    "a list": lambda content, tensors: "[]",
    "nested": lambda content, tensors: "[" * 100_000,
    "sites a list": lambda content, tensors: {**content, "sites": [1]},
    "no model": lambda content, tensors: {**content, "model": None},
    "limit a word": lambda content, tensors: {**content, "heldout_limit": "many"},
    "other version": lambda content, tensors: {**content, "version": 99},
    "tokens negative": setting("n_tokens", -1),
    "tokens a word": setting("n_tokens", "x"),
    "tokens infinite": setting("n_tokens", float("inf")),
    "mean NaN": setting("mean", float("nan")),
    "linears a word": setting("linears", "abc"),
    "linears numbers": setting("linears", [1]),
    "hessian NaN": tensor("hessian", spoiled),
    "hessian narrower": tensor("hessian", lambda a: a[:-1]),
    "hessian negative": tensor("hessian", lambda a: -a),
    "hessian of integers": tensor("hessian", lambda a: a.astype(np.int64)),
    "absmax a number": tensor("absmax", lambda a: a[0].reshape(())),
    "absmax NaN": tensor("absmax", spoiled),
    "histogram of floats": tensor("histogram", lambda a: a.astype(np.float32)),
    "histogram empty": tensor("histogram", lambda a: a[:0]),
    "heldout NaN": tensor("heldout", spoiled),
    "heldout narrower": tensor("heldout", lambda a: a[:, :-1]),
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN_STATISTICS.values(), ids=BROKEN_STATISTICS)
def test_broken_statistics_are_refused(change, job):
    assert ptq("calibrate", job, "--activations", "acts", "-o", "c.safetensors").code == 0
    changed_statistics(change)
    refused("gptq", job, "--calibration", "c.safetensors", words=("c.safetensors",))


# ---- quantized folders ----


def changed_output(change):
    path = Path("out/model.safetensors")
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    content = json.loads(header["__metadata__"]["ptq"])
    data = bytearray(raw[8 + length :])
    content = change(content, header, data) or content
    header["__metadata__"]["ptq"] = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(raw_safetensors(header, bytes(data)))


def layer_setting(key, value):
    def change(content, header, data):
        content["layers"][Q][key] = value

    return change


def written(part, value, dtype):
    def change(content, header, data):
        start, _ = header[f"{Q}.{part}"]["data_offsets"]
        patch = np.array([value], dtype).tobytes()
        data[start : start + len(patch)] = patch

    return change


BROKEN_OUTPUTS = {
    **{f"bits {bits!r}": layer_setting("bits", bits) for bits in (0, 1, 9, True, "4", None, 3)},
    **{f"shape {shape!r}": layer_setting("shape", shape) for shape in (
        [12, 33], [-12, -32], [0, 32], [], 5, [12], None, [6, 64])},
    **{f"group {size!r}": layer_setting("group_size", size) for size in (4, -2, 1.5, None)},
    "sym a word": layer_setting("sym", "yes"),
    "scale_dtype": layer_setting("scale_dtype", "float32"),
    "scale_dtype unknown": layer_setting("scale_dtype", "int4"),
    "tensor unknown": layer_setting("tensor", "nothing.weight"),
    "tensor of another shape": layer_setting("tensor", f"{DOWN}.weight"),
    "g_idx too large": written("g_idx", 99, np.int32),
    "g_idx negative": written("g_idx", -1, np.int32),
    "scales NaN": written("scales", np.nan, np.float16),
    "scales inf": written("scales", np.inf, np.float16),
    "no layers": lambda content, header, data: {**content, "layers": 5},
    "format unknown": lambda content, header, data: {**content, "format": "zip"},
    "version": lambda content, header, data: {**content, "version": 2},
    "nested": lambda content, header, data: "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN_OUTPUTS.values(), ids=BROKEN_OUTPUTS)
def test_broken_outputs_are_refused(change, job):
    arguments = ["--activations", "acts", "--act-order", "desc", "-g", 8, "-o", "out"]
    assert ptq("gptq", job, *arguments).code == 0
    changed_output(change)
    outcome = refused("eval", job, "out")
    assert "out" in outcome.errors[0] or "model.safetensors" in outcome.errors[0]
    with pytest.raises(ptq_cli.PtqError):
        ptq_cli.evaluate(job, "out")


def test_an_unknown_module_of_an_output(job):
    ptq("pack", job, "-o", "out")
    with pytest.raises(ptq_cli.PtqError, match=r"no quantized module 'x'\n.*layers\.0"):
        ptq_cli.load_weight("out", "x")


# ---- settings and recipes ----


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "1"], ["--bits", "9"], ["--bits", "4.5"], ["--bits", ""], ["--bits"],
        ["--group-size", "-2"], ["--group-size", "x"], ["--damp-percent", "-1"],
        ["--damp-percent", "99"], ["--act-order", "wild"], ["--refine", "-1"], ["--sweeps", "101"],
        ["--scale-dtype", "int8"], ["--format", "zip"], ["--nonsense"], ["--max-fallbacks", "-1"],
        ["--min-gain", "much"], ["another-argument"],
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(options, job):
    before = os.listdir()
    outcome = ptq("gptq", job, *options)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert "Error: " in outcome.err
    assert os.listdir() == before


@pytest.mark.parametrize("arguments", [["gptq"], ["nonsense"], ["eval", "a"], ["--nonsense"]])
def test_wrong_commands_are_exit_code_2(arguments):
    assert ptq(*arguments).code == 2


@pytest.mark.parametrize(
    "options",
    [["--damp-percent", "nan"], ["--narrow-range", "--asym"], ["--ignore", "("],
     ["--ignore", "a{99999999999}"], ["--ignore", "(" * 5000 + ")" * 5000],
     ["--ignore", "no_such_name"], ["--include", "no_such_name"], ["--include", "bias"],
     ["--ignore", "."]],
    ids=lambda options: options[-1][:20],
)  # fmt: skip
def test_settings_that_contradict_themselves_or_the_model(options, job):
    word = options[-1][:20] if options[0] in ("--ignore", "--include") else ""
    words = (word,) if options[-1] != "." else ("nothing", "left to quantize")[1:]
    refused("gptq", job, "--activations", "acts", *options, words=words)


RECIPES = {
    "bitz = 4": ("bitz", "bits"),
    "grp_size = 4": ("grp_size", "group_size"),
    "zzzzz = 4": ("zzzzz", "known:"),
    "bits = 9": ("bits", "9"),
    "bits = 'four'": ("bits", "four"),
    "bits = true": ("bits",),
    "bits = 4.0": ("bits",),
    "group_size = -7": ("group_size", "-7"),
    "damp_percent = nan": ("damp_percent",),
    "damp_percent = inf": ("damp_percent",),
    "damp_percent = 2020-01-01": ("damp_percent",),
    "sym = 1": ("sym",),
    "act_order = 'wild'": ("act_order", "static"),
    "ignore = 'x'": ("ignore",),
    "ignore = [1]": ("ignore",),
    "format = 'zip'": ("format",),
    "method = 'rtn'": ("ptq rtn", "ptq gptq"),
    "method = 5": ("5",),
    "layers = 5": ("layers",),
    "layers = [5]": ("layers",),
    "[[layers]]\nbits = 4": ("match",),
    "[[layers]]\nmatch = 5": ("match",),
    "[[layers]]\nmatch = '.'\nbits = 9": ("bits", "9"),
    "[[layers]]\nmatch = '.'\nbitz = 9": ("bitz", "bits"),
    "[[layers]]\nmatch = '.'\nskip = 1": ("skip",),
    "[[layers]]\nmatch = '('": ("match", "("),
    "bits = ": ("TOML",),
    "[" * 20_000: ("TOML",),
    "bits = 4\nbits = 3": ("TOML",),
}


@pytest.mark.parametrize(("text", "words"), RECIPES.items(), ids=[k[:30] for k in RECIPES])
def test_recipes_that_are_none(text, words, job):
    Path("recipe.toml").write_text(text)
    outcome = refused("gptq", job, "--activations", "acts", "--config", "recipe.toml")
    assert "recipe.toml" in outcome.errors[0]
    for word in words:
        assert word in outcome.errors[0]


def test_a_layer_rule_that_matches_nothing(job):
    Path("recipe.toml").write_text("[[layers]]\nmatch = 'no_such_name'\nbits = 3\n")
    arguments = ["gptq", job, "--activations", "acts", "--config", "recipe.toml"]
    refused(*arguments, words=("[[layers]]", "no_such_name"))


@pytest.mark.parametrize("kind", ["missing", "folder", "bytes", "fifo"])
def test_recipes_that_are_no_text_files(kind, job):
    path = Path("r.toml")
    if kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe\0")
    elif kind == "fifo":
        os.mkfifo(path)
    outcome = ptq("gptq", job, "--config", path)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert "r.toml" in outcome.errors[0]


def test_the_recipes_of_this_test_are_as_broken_as_they_look():
    unreadable = 0
    for text in RECIPES:
        try:
            tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError):
            unreadable += 1
    assert unreadable == 3


# ---- outputs ----


@pytest.mark.parametrize("command", ["gptq", "rtn", "pack", "calibrate"])
def test_an_existing_output_is_refused_without_force_and_exchanged_with_it(command, job):
    source = [] if command == "pack" else ["--activations", "acts"]
    Path("out").mkdir() if command != "calibrate" else Path("out").write_text("mine")
    arguments = [command, job, *source, "-o", "out"]
    refused(*arguments, words=("out", "exists", "--force"))
    assert ptq(*arguments, "--force").code == 0
    assert Path("out").is_file() == (command == "calibrate")
    first = tree(Path()) if command != "calibrate" else Path("out").read_bytes()
    assert ptq(*arguments, "--force").code == 0
    assert first == (tree(Path()) if command != "calibrate" else Path("out").read_bytes())


@pytest.mark.parametrize("output", [".", "..", "/", "nowhere/out", "model.safetensors/out"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_outputs_that_cannot_be(output, force, job):
    refused("pack", job, "-o", output, *force)


def test_a_dangling_link_as_output(job):
    Path("out").symlink_to("nothing")
    refused("pack", job, "-o", "out", "--force", words=("out", "link"))


def test_a_name_too_long_for_the_file_system(job):
    refused("pack", job, "-o", "x" * 300, words=("File name too long",))


@pytest.mark.parametrize("output", ["m", "m/model.safetensors", "acts", "stats", "linked"])
def test_an_output_never_replaces_what_is_read(output, job):
    Path("m").mkdir()
    small_model(Path("m/model.safetensors"))
    Path("linked").symlink_to("m")
    Path("stats").mkdir()
    stats = Path("stats/c.safetensors")
    assert ptq("calibrate", "m", "--activations", "acts", "-o", stats).code == 0
    source = ["--calibration", stats] if output == "stats" else ["--activations", "acts"]
    refused("gptq", "m", *source, "-o", output, "--force", words=("which is being read",))


@pytest.mark.parametrize("output", ["model.safetensors", "acts", "acts/layers.0.q_proj.npy"])
def test_a_calibration_never_replaces_what_is_read(output, job):
    arguments = ["calibrate", job, "--activations", "acts", "-o", output, "--force"]
    refused(*arguments, words=("which is being read",))


@pytest.mark.parametrize("path", ["r.txt", "r", "nowhere/r.csv", "folder.json"])
def test_report_paths_are_checked_before_the_work(path, job):
    Path("folder.json").mkdir()
    refused("pack", job, "--report", path, words=(path.split("/")[0],))


def test_a_work_folder_that_is_somebody_elses_is_not_touched(job):
    Path("out.partial").mkdir()
    Path("out.partial/thesis.txt").write_text("mine")
    before = tree(Path())
    outcome = ptq("pack", job, "-o", "out")
    assert outcome.code == 1
    assert "out.partial" in outcome.errors[0]
    assert tree(Path()) == before


def test_a_work_folder_that_is_a_link_is_not_followed(job):
    Path("elsewhere").mkdir()
    Path("elsewhere/thesis.txt").write_text("mine")
    Path("out.partial").symlink_to("elsewhere")
    before = tree(Path())
    assert ptq("pack", job, "-o", "out").code == 1
    assert tree(Path()) == before


# ---- numerical failure ----


def test_a_hessian_that_cannot_be_factored_is_exit_code_4(job):
    """More columns than tokens and no damping: singular, whatever the ladder tries is recorded."""
    small_activations(Path("acts"), 96, **{Q: random_inputs(4, 32)})
    arguments = ["gptq", job, "--activations", "acts", "--damp-percent", "0", "--json"]
    outcome = ptq(*arguments)
    assert outcome.code == 0
    row = next(row for row in outcome.document["layers"] if row["module"] == Q)
    assert row["damp_percent"] > 0
    assert any("damp_percent raised" in note for note in row["notes"])


# ---- not errors ----


def rounded(weight, *options, command="pack", name="w.weight", **more):
    """Quantize a model of one weight; its dequantized weight and report row."""
    write_model(Path("one.safetensors"), {name: weight, **more})
    outcome = ptq(command, "one.safetensors", *options, "-o", "one", "--json", "--force")
    assert outcome.code == 0, outcome.err
    assert ptq("eval", "one.safetensors", "one").code == 0
    (row,) = outcome.document["layers"]
    return ptq_cli.load_weight("one", row["module"]), row


SYMMETRY = pytest.mark.parametrize("symmetry", ["--sym", "--asym"])


@SYMMETRY
@pytest.mark.parametrize("command", ["pack", "rtn", "gptq"])
def test_all_zero_weights_stay_zero(symmetry, command):
    weight = random_weight(6, 32, dtype=np.float32)
    weight[2] = 0
    weight[:, 8:16] = 0
    result, _ = rounded(weight, symmetry, "-g", 8, command=command)
    assert not result[2].any()
    assert not result[:, 8:16].any()
    assert np.isfinite(result).all()
    result, row = rounded(np.zeros((4, 8), np.float32), symmetry, command=command)
    assert not result.any()
    assert row["rel_err"] == 0


@SYMMETRY
@pytest.mark.parametrize("value", [0.83, -0.83, 1e-4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_weights(symmetry, value, bits):
    weight = np.full((4, 16), value, np.float32)
    result, _ = rounded(weight, symmetry, "-b", bits, "--scale-dtype", "float32")
    scale = abs(value) * 2 / (2**bits - 1)
    assert np.abs(result - weight).max() <= scale / 2 * (1 + 1e-6)


@SYMMETRY
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 5)])
@pytest.mark.parametrize("group", [-1, 0, 1, 3, 128])
def test_small_weights_and_groups_wider_than_they(symmetry, shape, group):
    result, row = rounded(random_weight(*shape), symmetry, "-g", group, "-b", 8)
    assert result.shape == shape
    assert row["group_size"] == group
    assert row["rel_err"] < 1e-3


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-9, 6e-8])
@SYMMETRY
def test_tiny_weights_stay_finite(tiny, symmetry):
    weight = np.array([[tiny, -tiny, 0, tiny]] * 2, np.float32)
    result, _ = rounded(weight, symmetry)
    assert np.isfinite(result).all()
    assert np.abs(result).max() <= 1e-6


@pytest.mark.parametrize("dead", ["one", "all but one", "all"])
def test_dead_columns_keep_their_weights(dead, job):
    inputs = random_inputs(96, 32)
    columns = {"one": [3], "all but one": list(range(31)), "all": list(range(32))}[dead]
    inputs[:, columns] = 0
    np.save(f"acts/{Q}.npy", inputs)
    weight = small_tensors()[f"{Q}.weight"].astype(np.float32)
    half_step = np.abs(weight).max() / 255
    arguments = ["gptq", job, "--activations", "acts", "--json", "-b", 8]
    for options in (["--no-mse", "--refine", 0, "--sweeps", 0, "-o", "paper"], ["-o", "out"]):
        outcome = ptq(*arguments, *options)
        assert outcome.code == 0
        row = next(row for row in outcome.document["layers"] if row["module"] == Q)
        assert row["dead_columns"] == len(columns)
        if dead == "all":
            assert (row["method"], row["fallback"]) == ("rtn", "its inputs are all zero")
        assert any(
            f"zero, up to {len(columns)} of 32: layers.0." in line for line in outcome.warnings
        )
        assert any(f"{Q} {len(columns)} of 32" in line for line in outcome.document["warnings"])
    plain = np.abs(ptq_cli.load_weight("paper", Q) - weight)
    assert plain[:, columns].max() <= 1.01 * half_step
    # Ranges and scales serve the columns that live; no weight is deleted all the same.
    assert np.abs(ptq_cli.load_weight("out", Q) - weight).max() < 0.15 * np.abs(weight).max()


def test_one_token_and_few_tokens_are_warnings_with_both_numbers(job):
    small_activations(Path("acts"), 20)
    outcome = ptq("calibrate", job, "--activations", "acts")
    assert outcome.code == 0
    assert any("18 tokens" in line and "32 columns" in line for line in outcome.warnings)
    small_activations(Path("acts"), 1)
    outcome = ptq("gptq", job, "--activations", "acts", "-o", "out")
    assert outcome.code == 0
    assert any("on 1 tokens" in line and "32 columns" in line for line in outcome.warnings)


def test_other_tensors_are_copied_and_listed(job):
    extra = {
        "conv.weight": random_weight(4, 3, 2, 2),
        "scalar": np.array(1.5, np.float64),
        "empty.weight": np.zeros((0, 8), np.float32),
        "empty2.weight": np.zeros((8, 0), np.float16),
        "mask": np.array([True, False]),
        "bytes.weight": np.zeros((3, 3), np.uint8),
        "nan.bias": np.array([np.nan], np.float32),
    }
    small_model(job, **extra)
    document = ptq("gptq", job, "--activations", "acts", "--json", "-o", "out").document
    reasons = {entry["tensor"]: entry["reason"] for entry in document["left_alone"]}
    assert reasons["conv.weight"] == "rank 4"
    assert reasons["scalar"] == "rank 0" or "F64" in reasons["scalar"]
    assert reasons["empty.weight"] == reasons["empty2.weight"] == "empty"
    assert reasons["bytes.weight"] == "dtype U8"
    before, after = read_model(job), read_model(Path("out/model.safetensors"))
    for name in extra:
        assert after[name] == before[name]


def test_higher_ranks_are_rounded_where_included(job):
    small_model(job, **{"conv.weight": random_weight(4, 3, 2, 2)})
    arguments = ["gptq", job, "--activations", "acts", "--include", "conv", "--json", "-o", "out"]
    outcome = ptq(*arguments)
    row = next(row for row in outcome.document["layers"] if row["module"] == "conv")
    assert (row["method"], row["shape"]) == ("rtn", [4, 3, 2, 2])
    assert any("conv" in line for line in outcome.warnings)
    assert ptq_cli.load_weight("out", "conv").shape == (4, 3, 2, 2)
    assert ptq("eval", job, "out", "--activations", "acts").code == 0


def test_tied_weights_are_both_rounded_to_the_same(job):
    weight = random_weight(32, 40, seed=5)
    small_model(job, **{"a.weight": weight, "b.weight": weight})
    ptq("pack", job, "-o", "out")
    a, b = (ptq_cli.load_weight("out", name) for name in "ab")
    assert np.array_equal(a, b)


WEIRD = {
    "escape": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "bidi": "a\u202egnp.exe",
    "newline": "two\nptq: error: lines\r",
    "null": "nul\0l",
    "markup": "[red]",
    "closing": "[/x]",
    "smile": ":smile:",
    "percent": "%s%d{0}",
    "up": "../../x",
    "root": "/etc/x",
    "empty": "",
    "dots": "...",
    "long": "x" * 10_000,
    "metadata": "__metadata__",
    "unicode": "héllo wörld 模型",
    "upper": "TWIN",
    "lower": "twin",
    "backslash": "a\\b",
    "quote": "a\"b'c",
    "regex": "a(b|c)*[",
    "config": "config.json",
}


@pytest.mark.parametrize("command", ["pack", "gptq"])
def test_weird_names_are_data(command, tmp_path):
    """They are shown escaped, never interpreted, and choose no path."""
    Path("in").mkdir()
    os.chdir("in")
    weights = {
        f"{name}.weight": random_weight(4, 8, seed=i) for i, name in enumerate(WEIRD.values())
    }
    write_model(Path("model.safetensors"), weights)
    outcome = ptq(command, "model.safetensors", "-o", "out", "--top", 0)
    assert outcome.code == 0, outcome.err
    for text in (outcome.out, outcome.err):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\0" not in text
        assert "\r" not in text
    for shown in (
        "[red]",
        "[/x]",
        ":smile:",
        "%s%d{0}",
        "../../x",
        "\\x1b[31mred",
        "\\u202e",
        "TWIN",
    ):
        assert shown in outcome.out
    assert sorted(os.listdir()) == ["model.safetensors", "out"]
    assert os.listdir(tmp_path) == ["in"]
    assert sorted(os.listdir("out")) == OUTPUT
    rows = {row["module"] for row in json.loads(Path("out/report.json").read_text())["layers"]}
    assert rows == set(WEIRD.values())
    for name in WEIRD.values():
        original = weights[f"{name}.weight"].astype(np.float32)
        assert np.abs(ptq_cli.load_weight("out", name) - original).max() < 0.01
    assert ptq("eval", "model.safetensors", "out", "--report", "r.csv").code == 0


def test_an_error_shows_a_long_or_hostile_name_safely(job):
    for name in ("\x1b[31m\nx", "y" * 10_000):
        weight = random_weight(4, 8)
        weight[0, 0] = np.nan
        write_model(Path("bad.safetensors"), {f"{name}.weight": weight})
        outcome = refused("pack", "bad.safetensors", words=("bad.safetensors", "[0, 0]"))
        assert "\x1b" not in outcome.err
        assert len(outcome.errors[0]) < 700


def test_activations_are_found_by_exact_names_only(job):
    """A module that is called like a path opens no file but one of that very name."""
    np.save("secret.npy", random_inputs(10, 8))
    Path("empty").mkdir()
    write_model(Path("m.safetensors"), {"../secret.weight": random_weight(4, 8)})
    refused("gptq", "m.safetensors", "--activations", "empty", words=("../secret",))


# ---- twins of one activation file ----


def statistics(name, *options):
    """The statistics file made from acts/, without its metadata."""
    assert (
        ptq("calibrate", "model.safetensors", "--activations", "acts", "-o", name, *options).code
        == 0
    )
    return Path(name).read_bytes()


def test_orders_and_shapes_of_one_array_give_the_same_bytes(job):
    for dtype in (np.float16, np.float32, np.float64):
        inputs = random_inputs(96, 32, dtype=dtype)
        expected = None
        twins = {
            "c": inputs,
            "f": np.asfortranarray(inputs),
            "3d": inputs.reshape(4, 24, 32),
            "3d-f": np.asfortranarray(inputs.reshape(4, 24, 32)),
            "big": inputs.astype(inputs.dtype.newbyteorder(">")),
            "big-f": np.asfortranarray(inputs.astype(inputs.dtype.newbyteorder(">"))),
        }
        for name, twin in twins.items():
            np.save(f"acts/{Q}.npy", twin)
            made = statistics(f"{name}-{np.dtype(dtype).name}.safetensors")
            expected = expected or made
            assert made == expected, name


def test_wider_floats_of_the_same_values_give_the_same_statistics(job):
    inputs = random_inputs(96, 32)
    results = []
    for dtype in (np.float16, np.float32, np.float64):
        np.save(f"acts/{Q}.npy", inputs.astype(dtype))
        statistics(f"{np.dtype(dtype).name}.safetensors")
        tensors = read_model(Path(f"{np.dtype(dtype).name}.safetensors"))
        results.append({k: v for k, v in tensors.items() if not k.endswith(("heldout", "sample"))})
    assert results[0] == results[1] == results[2]


def test_bfloat16_kept_as_uint16(job):
    inputs = random_inputs(96, 32, dtype=ml_dtypes.bfloat16)
    for site in (Path(p) for p in sorted(os.listdir("acts"))):
        width = np.load(f"acts/{site}").shape[1]
        values = inputs if site.stem == Q else random_inputs(96, width, dtype=ml_dtypes.bfloat16)
        np.save(f"acts/{site}", values.view(np.uint16))
    refused("calibrate", job, "--activations", "acts", words=(".npy", "uint16", "--bf16"))
    statistics("u16.safetensors", "--bf16")
    for file in os.listdir("acts"):
        values = np.load(f"acts/{file}").view(ml_dtypes.bfloat16)
        np.save(f"acts/{file}", values.astype(np.float32))
    statistics("f32.safetensors")
    ours, theirs = (read_model(Path(f"{n}.safetensors")) for n in ("u16", "f32"))
    for name in theirs:
        assert name.endswith(("heldout", "sample")) or ours[name] == theirs[name]
    assert ours[f"{Q}.heldout"][0] == "BF16"
    refused(
        "calibrate", job, "--activations", "acts", "--bf16", words=(".npy", "float32", "uint16")
    )
