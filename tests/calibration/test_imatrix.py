"""Importance matrices of llama.cpp, read as statistics and written from them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.calibration.from_imatrix import imatrix_source
from ptq_cli.errors import InputError
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.gguf_source import open_gguf_source
from ptq_cli.storage.sources import open_float
from tests.builders import SAMPLE, half_sample, ptq, random_weight
from tests.cli import tiny_folders
from tests.refusals import refused
from tests.storage.gguf_files import EXPERTS, WIDTH, tensors, write_gguf_file, write_unknown_gguf

gguf = pytest.importorskip("gguf")

Entries = Mapping[str, tuple[np.ndarray, np.ndarray]]
PACK = ("--format", "gguf", "-b", 4, "-g", 32)
QKV, UP, DOWN = (f"blk.0.{name}.weight" for name in ("attn_qkv", "ffn_up_exps", "ffn_down_exps"))


@pytest.fixture(autouse=True)
def _here(here):
    """Every test in a folder of its own."""


def write_imatrix(path: str, entries: Entries) -> None:
    """As llama.cpp writes it. entries: sums [n, in_features] and counts [n] by tensor"""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_old_imatrix(path: str, entries: Entries, calls: int = 3) -> None:
    """The older form: means times calls, one entry after the other."""
    data = struct.pack("<i", len(entries))
    for name, (sums, counts) in entries.items():
        means = (sums / counts[:, None]).astype(np.float32) * calls
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, means.size) + means.astype("<f4").tobytes()
    Path(path).write_bytes(data + struct.pack("<ii", 4, 8) + b"text.txt")


def importance() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For the file of `write_unknown_gguf`, a few inputs of each linear far larger than others."""
    rng = np.random.default_rng(1)

    def entry(n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        sums = np.where(rng.random((n, width)) < 0.1, 1e4, 1.0) * rng.random((n, width)) + 0.5
        return sums, rng.integers(200, 2000, n)

    return {QKV: entry(1, 64), UP: entry(EXPERTS, 64), DOWN: entry(EXPERTS, 32)}


@pytest.mark.parametrize("write", [write_imatrix, write_old_imatrix])
def test_the_hessian_is_the_mean_squares(write) -> None:
    entries = importance()
    write_unknown_gguf(Path("m.gguf"))
    write("i.gguf", entries)
    source = imatrix_source(open_gguf_source(Path("m.gguf"), any_architecture=True), Path("i.gguf"))
    assert len(source.sites) == 1 + 2 * EXPERTS
    assert not source.surplus
    for name, (sums, counts) in entries.items():
        module = name.removesuffix(".weight")
        for number, own in enumerate(sums):
            site = module if len(sums) == 1 else f"{module}.{number}"
            found = source.load(site)
            expected = np.diag(own / counts[number])
            np.testing.assert_allclose(found.hessian, expected, rtol=1e-6)
            if write is write_imatrix:
                assert found.n_tokens == counts[number]
    assert source.only("blk.0.attn_qkv").digest("blk.0.attn_qkv") == source.digest("blk.0.attn_qkv")


def test_an_expert_that_no_token_reaches_has_the_statistics_of_all() -> None:
    entries = importance()
    sums, counts = entries[UP]
    sums[1], counts[1] = 0, 0
    write_unknown_gguf(Path("m.gguf"))
    write_imatrix("i.gguf", entries)
    source = imatrix_source(open_gguf_source(Path("m.gguf"), any_architecture=True), Path("i.gguf"))
    found = source.load("blk.0.ffn_up_exps.1")
    np.testing.assert_allclose(found.hessian.diagonal(), sums.sum(0) / counts.sum(), rtol=1e-6)
    assert (found.own_tokens, found.n_tokens) == (0, counts.sum())
    outcome = ptq("rtn", "m.gguf", *PACK, "--imatrix", "i.gguf", "-o", "out.gguf")
    assert outcome.code == 0, outcome.err
    rows = {row["module"]: row for row in json.loads(Path("out.report.json").read_text())["layers"]}
    assert "0 tokens reach it" in rows["blk.0.ffn_up_exps.1"]["notes"][0]


def errors(path: str, arrays: Mapping[str, np.ndarray], entries: Entries) -> dict[str, float]:
    """Of each module's outputs by the entries, relative."""
    found, result = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}, {}
    for name, (sums, counts) in entries.items():
        n, width = sums.shape
        values = gguf.dequantize(found[name].data, found[name].tensor_type).reshape(n, -1, width)
        for i, weight in enumerate(arrays[name].reshape(n, -1, width)):
            error, whole = (
                (sums[i] / counts[i] * x**2).sum() for x in (weight - values[i], weight)
            )
            module = name.removesuffix(".weight")
            result[module if n == 1 else f"{module}.{i}"] = error / whole
    return result


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rounding_looks_at_it(method: str) -> None:
    arrays, entries = write_unknown_gguf(Path("m.gguf")), importance()
    write_imatrix("i.gguf", entries)
    assert ptq("rtn", "m.gguf", *PACK, "-o", "without.gguf").code == 0
    outcome = ptq(method, "m.gguf", *PACK, "--imatrix", "i.gguf", "-o", "with.gguf")
    assert outcome.code == 0, outcome.err
    assert "holds the diagonal of the Hessian alone" in outcome.err
    found, plain = (errors(f"{x}.gguf", arrays, entries) for x in ("with", "without"))
    assert sum(found.values()) < 0.6 * sum(plain.values())
    rows = json.loads(Path("with.report.json").read_text())["layers"]
    assert all(row["calibrated"] for row in rows)
    assert {row["module"]: row["rel_err"] for row in rows} == pytest.approx(found, rel=1e-3)


def test_entries_that_are_missing_are_listed() -> None:
    write_unknown_gguf(Path("m.gguf"))
    entries = importance()
    del entries[UP]
    write_imatrix("i.gguf", entries)
    words = ("i.gguf", "3 layers", "blk.0.ffn_up_exps.{0-2}")
    said = refused("gptq", "m.gguf", *PACK, "--imatrix", "i.gguf", words=words)
    assert "--fallback rtn" in said.err
    options = (*PACK, "--imatrix", "i.gguf", "-o", "out.gguf")
    for command in (("gptq", "m.gguf", "--fallback", "rtn"), ("rtn", "m.gguf", "--force")):
        outcome = ptq(*command, *options)
        assert outcome.code == 0
        assert "3 layers" in outcome.err
        assert "blk.0.ffn_up_exps.{0-2}" in outcome.err


@pytest.mark.parametrize(("change", "words"), [
    ({QKV: (np.ones((1, 32)), np.ones(1))}, "attn_qkv.weight: 32 values for tensor"),
    ({UP: (np.ones((2, 64)), np.ones(2))}, "3 experts of 64"),
    ({QKV: (-np.ones((1, 64)), np.ones(1))}, "negative or not finite"),
    ({QKV: (np.full((1, 64), np.nan), np.ones(1))}, "negative or not finite"),
    ({QKV: (np.ones((1, 64)), -np.ones(1))}, "negative or not finite"),
    ({QKV: (np.full((1, 64), 1e36), np.ones(1))}, "a sum of squares of 1e+36, which no inputs"),
    ({QKV: (np.ones((1, 64)), np.ones(3))}, "64 sums, but 3 counts"),
])  # fmt: skip
def test_entries_that_do_not_fit(change: Entries, words: str) -> None:
    write_unknown_gguf(Path("m.gguf"))
    write_imatrix("i.gguf", importance() | change)
    refused("rtn", "m.gguf", *PACK, "--imatrix", "i.gguf", words=("i.gguf", words))


def test_files_that_are_none() -> None:
    write_unknown_gguf(Path("m.gguf"))
    imatrix = ("--imatrix", "i.gguf")
    refused("rtn", "m.gguf", *PACK, *imatrix, words=("i.gguf", "No such file"))
    Path("i.gguf").write_bytes(Path("m.gguf").read_bytes())
    refused("rtn", "m.gguf", *PACK, *imatrix, words=("general.type is not 'imatrix'",))
    for data in (b"", b"PK\x03\x04" * 9, struct.pack("<iii", 1, 1 << 30, 0), b"\0" * 20):
        Path("i.gguf").write_bytes(data)
        refused("rtn", "m.gguf", *PACK, *imatrix, words=("i.gguf",))
    write_imatrix("i.gguf", {"blk.7.attn_q.weight": (np.ones((1, 64)), np.ones(1))})
    refused("rtn", "m.gguf", *PACK, *imatrix, words=("none of its 1 entries", "blk.7.attn_q"))


def test_what_it_is_not_for() -> None:
    half_sample(Path("s"))
    write_imatrix("i.gguf", {"blk.0.attn_q.weight": (np.ones((1, 128)), np.ones(1))})
    imatrix, excluded = ("--imatrix", "i.gguf"), "--imatrix excludes"
    refused("gptq", "s", *imatrix, "--calibration", "x.safetensors", words=(excluded,))
    refused("gptq", "s", *imatrix, "--tokens", "x.npy", words=(excluded,))
    with pytest.raises(InputError, match="--imatrix does nothing for awq"):
        ptq_cli.awq("s", imatrix="i.gguf")
    refused("rtn", "s", *imatrix, "--scheme", "FP8", words=("no statistics to take scales of",))


def test_names_of_a_model_folder_and_of_a_known_architecture() -> None:
    entry = {"blk.0.attn_q.weight": (np.full((1, 128), 3.0), np.ones(1))}
    half_sample(Path("s"))
    write_imatrix("i.gguf", entry)
    source = imatrix_source(open_checkpoint(Path("s")), Path("i.gguf"))
    assert set(source.sites) == {"model.layers.0.self_attn.q_proj"}
    write_gguf_file(Path("m.gguf"), tensors())
    write_imatrix("i.gguf", {"blk.0.attn_q.weight": (np.full((1, WIDTH), 3.0), np.ones(1))})
    source = imatrix_source(open_gguf_source(Path("m.gguf")), Path("i.gguf"))
    assert set(source.sites) == {"model.layers.0.self_attn.q_proj"}


def test_experts_of_a_model_folder() -> None:
    """Read, and written from activations, as parts of the tensors of all."""
    tiny_folders.mixtral(Path("m"))
    up = "blk.0.ffn_up_exps.weight"
    sums = np.arange(2 * 64, dtype=np.float32).reshape(2, 64)
    write_imatrix("i.gguf", {up: (sums, np.array([2, 4]))})
    source = imatrix_source(open_float(Path("m")), Path("i.gguf"))
    module = "model.layers.0.block_sparse_moe.experts.{}.w3"
    assert set(source.sites) == {module.format(0), module.format(1)}
    np.testing.assert_array_equal(source.load(module.format(1)).hessian.diagonal(), sums[1] / 4)
    np.save("tokens.npy", np.random.default_rng(0).integers(0, 48, (4, 32)))
    words = ("calibrate", "m", "--tokens", "tokens.npy", "-o", "s.safetensors")
    outcome = ptq(*words, "--imatrix-out", "o.gguf")
    assert outcome.code == 0, outcome.err
    found = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader("o.gguf").tensors}
    assert found[f"{up}.in_sum2"].shape == (2, 64)
    back = imatrix_source(open_float(Path("m")), Path("o.gguf"))
    known = open_calibration(Path("s.safetensors"))
    assert set(back.sites) >= {module.format(0), module.format(1)}
    assert set(back.sites) == {linear for x in known.sites.values() for linear in x.linears}


def test_written_from_statistics() -> None:
    half_sample(Path("s"))
    words = ("calibrate", "s", "--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 4,
             "-o", "s.safetensors", "--imatrix-out", "i.gguf")  # fmt: skip
    assert ptq(*words).code == 0
    statistics, reader = open_calibration(Path("s.safetensors")), gguf.GGUFReader("i.gguf")
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert reader.fields["general.type"].contents() == "imatrix"
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= set(reader.fields)
    for own, site in (("attn_q", "self_attn.q_proj"), ("attn_v", "self_attn.q_proj"),
                      ("ffn_up", "mlp.gate_proj"), ("ffn_down", "mlp.down_proj")):  # fmt: skip
        known = statistics.load(f"model.layers.1.{site}")
        sums, counts = (found[f"blk.1.{own}.weight.{part}"] for part in ("in_sum2", "counts"))
        assert (sums.shape, counts.shape) == ((1, known.in_features), (1, 1))
        assert counts[0, 0] == known.n_tokens
        np.testing.assert_allclose(sums[0] / counts[0], known.hessian.diagonal(), rtol=1e-6)
    back = imatrix_source(open_checkpoint(Path("s")), Path("i.gguf"))
    site = "model.layers.0.mlp.down_proj"
    expected = np.diag(statistics.load(site).hessian.diagonal())
    np.testing.assert_allclose(back.load(site).hessian, expected, rtol=1e-6)


def test_written_again() -> None:
    half_sample(Path("s"))
    words = ("calibrate", "s", "--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 2,
             "-o", "s.safetensors", "--imatrix-out", "i.gguf")  # fmt: skip
    Path("i.gguf").write_bytes(b"mine")
    refused(*words, words=("i.gguf: exists already",))
    assert ptq(*words, "--force").code == 0
    before = Path("i.gguf").read_bytes()
    again = ptq(*words)
    assert (again.code, "finished already" in again.err) == (0, True)
    Path("i.gguf").unlink()
    assert ptq(*words).code == 0
    assert Path("i.gguf").read_bytes() == before
    Path("i.gguf").write_bytes(b"mine")
    refused(*words, words=("i.gguf: exists already",))


def test_a_transposed_matrix_has_the_width_of_its_inputs() -> None:
    arrays = {"h.0.attn.c_attn.weight": random_weight(64, 192)}
    model = tiny_folders.model_folder(Path("m"), "gpt2", arrays, n_embd=64, n_layer=1, n_head=4)
    write_imatrix("i.gguf", {"blk.0.attn_qkv.weight": (np.full((1, 64), 3.0), np.ones(1))})
    source = imatrix_source(open_checkpoint(model), Path("i.gguf"))
    assert source.sites["h.0.attn.c_attn"].in_features == 64
