"""GGUF in, GGUF out: of any architecture everything is copied but the matrices that are rounded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.core.grid import Grid
from ptq_cli.numerics.rounding import round_to_nearest
from tests.builders import SAMPLE, half_sample, ptq, tree
from tests.refusals import refused
from tests.storage.gguf_files import EXPERTS, tensors, write_gguf_file, write_unknown_gguf

gguf = pytest.importorskip("gguf")

QUANTIZED = {"blk.0.attn_qkv.weight", "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"}
MADE = {"general.file_type", "general.quantization_version", "ptq"}
PACK = ("pack", "m.gguf", "--format", "gguf", "-b", 4, "-g", 32)


@pytest.fixture(autouse=True)
def _here(here):
    """Every test in a folder of its own."""


def key_values(path: str | Path) -> dict[str, bytes]:
    """Each key's kinds and value, as they stand in the file."""
    fields = gguf.GGUFReader(path).fields
    return {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }


def stored(path: str | Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("alignment", [None, 64])
def test_an_architecture_that_is_not_known(dtype: Any, alignment: int | None) -> None:
    arrays = write_unknown_gguf(Path("m.gguf"), dtype, alignment)
    outcome = ptq(*PACK, "-o", "out.gguf")
    assert outcome.code == 0, outcome.err
    assert sorted(os.listdir()) == ["m.gguf", "out.gguf", "out.report.json"]
    before, after = key_values("m.gguf"), key_values("out.gguf")
    assert {key: after[key] for key in before.keys() - MADE} == {
        key: before[key] for key in before.keys() - MADE
    }
    assert list(after)[: len(before)] == list(before)
    assert after.keys() - before.keys() == MADE - before.keys()
    given, found = stored("m.gguf"), stored("out.gguf")
    assert list(found) == list(given)
    for name, tensor in found.items():
        assert tensor.shape.tolist() == given[name].shape.tolist()
        if name not in QUANTIZED:
            assert tensor.tensor_type == given[name].tensor_type
            assert tensor.data.tobytes() == given[name].data.tobytes(), name
            continue
        assert tensor.tensor_type.name == "Q4_0"
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        matrix = arrays[name].reshape(-1, arrays[name].shape[-1]).astype(np.float32)
        grid = Grid(4, 32, scale_dtype="float16", mirrored=True)
        nearest = round_to_nearest(matrix, grid).dequantized().reshape(values.shape)
        np.testing.assert_array_equal(values, nearest)


def test_every_expert_has_a_row_in_the_report() -> None:
    write_unknown_gguf(Path("m.gguf"))
    assert ptq(*PACK, "-o", "out.gguf").code == 0
    layers = json.loads(Path("out.report.json").read_text())["layers"]
    assert {row["module"] for row in layers} == {
        "blk.0.attn_qkv",
        *(f"blk.0.ffn_{way}_exps.{n}" for way in ("up", "down") for n in range(EXPERTS)),
    }
    assert ptq("eval", "m.gguf", "out.gguf").code == 0
    assert ptq("inspect", "m.gguf").code == 0


def test_experts_stay_or_go_together() -> None:
    write_unknown_gguf(Path("m.gguf"))
    words = ("blk.0.ffn_up_exps.weight", "3 experts, which must have one type", "exps.1")
    refused(*PACK, "--ignore", r"up_exps\.1", words=words)
    assert ptq(*PACK, "--ignore", "up_exps", "-o", "out.gguf").code == 0
    kinds = {name: tensor.tensor_type.name for name, tensor in stored("out.gguf").items()}
    assert kinds["blk.0.ffn_up_exps.weight"] == "F32"
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q4_0"


def test_what_is_no_matrix_is_not_taken_in() -> None:
    write_unknown_gguf(Path("m.gguf"))
    refused(*PACK, "--include", "attn_k_b", words=("holds matrices", "blk.0.attn_k_b"))


def test_other_formats_and_tokens_need_a_known_architecture() -> None:
    write_unknown_gguf(Path("m.gguf"))
    np.save("tokens.npy", np.zeros((2, 8), np.int64))
    for options in (("--format", "ptq"), ("--format", "gguf", "--tokens", "tokens.npy")):
        refused("gptq", "m.gguf", *options, words=("m.gguf", "'phi9' is not understood"))


def test_a_quantized_source_and_a_scale_beside_a_tensor() -> None:
    """What is rounded anew is what the file stands for; its own scale is gone with its blocks."""
    arrays = tensors()
    name, other = "blk.0.ffn_down", "blk.0.ffn_up"
    wide = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    packed = {f"{name}.weight": ("Q8_0", gguf.quantize(wide, kinds.Q8_0)),
              f"{other}.weight": ("Q8_0", gguf.quantize(wide, kinds.Q8_0))}  # fmt: skip
    half = np.array([0.5], np.float32)
    arrays |= {
        f"{name}.scale": half,
        f"{other}.scale": half,
        "extra.weight": np.ones(3, np.float32),
    }
    write_gguf_file(Path("m.gguf"), arrays, packed)
    refused("eval", "m.gguf", "m.gguf", words=("m.gguf", "have scales beside them"))
    outcome = ptq("rtn", "m.gguf", "--format", "gguf", "-b", 5, "-g", 32, "--ignore", "ffn_up",
                  "-o", "out.gguf", "--on-misfit", "keep")  # fmt: skip
    assert outcome.code == 0, outcome.err
    given, found = stored("m.gguf"), stored("out.gguf")
    assert list(found) == [own for own in given if own != f"{name}.scale"]
    assert found[f"{other}.weight"].data.tobytes() == given[f"{other}.weight"].data.tobytes()
    assert found[f"{name}.weight"].tensor_type.name == "Q5_0"
    values = gguf.dequantize(found[f"{name}.weight"].data, kinds.Q5_0)
    np.testing.assert_allclose(values, wide / 2, atol=0.12)


def test_a_known_architecture_keeps_its_key_values_and_the_order_of_its_rows() -> None:
    write_gguf_file(Path("m.gguf"), tensors(), rope__dimension_count=4)
    assert ptq(*PACK, "--on-misfit", "keep", "-o", "out").code == 0
    before, after = key_values("m.gguf"), key_values("out/model.gguf")
    assert before.items() <= after.items()
    assert "llama.rope__dimension_count" in after
    given, found = stored("m.gguf"), stored("out/model.gguf")
    q = found["blk.0.attn_q.weight"]
    values = gguf.dequantize(q.data, q.tensor_type)
    assert np.abs(values - given["blk.0.attn_q.weight"].data).max() < 0.25  # half a step
    assert ptq("eval", "m.gguf", "out", "--max-rel-err", 0.01).code == 0


def test_a_setting_that_is_not_understood_is_copied() -> None:
    """A llama with rope scaling: its names are known, its config.json is not."""
    write_gguf_file(Path("m.gguf"), tensors(), **{"rope.scaling.type": "ntk"})
    refused("pack", "m.gguf", "-g", 32, words=("rope.scaling.type is 'ntk'",))
    assert ptq(*PACK, "--on-misfit", "keep", "-o", "out.gguf").code == 0
    assert key_values("m.gguf").items() <= key_values("out.gguf").items()
    assert ptq("eval", "m.gguf", "out.gguf", "--max-rel-err", 0.01).code == 0


def test_the_second_run_says_so() -> None:
    write_unknown_gguf(Path("m.gguf"))
    words = (*PACK, "-o", "out.gguf")
    assert ptq(*words).code == 0
    before = tree(Path())
    again = ptq(*words)
    assert (again.code, "out.gguf: finished already" in again.err) == (0, True)
    assert tree(Path()) == before
    refused(*words, "-b", 5, words=("out.gguf: exists already, made with other bits",))
    Path("out.report.json").write_text("{}")
    refused(*words, words=("out.gguf: exists already, but out.report.json is not as the run",))
    Path("out.report.json").unlink()
    refused(*words, words=("out.gguf: exists already, but out.report.json is missing",))
    assert ptq(*words, "--force").code == 0
    assert tree(Path()) == before


def test_another_chat_template_is_another_input() -> None:
    write_unknown_gguf(Path("m.gguf"))
    words = (*PACK, "-o", "out.gguf")
    assert ptq(*words).code == 0
    data = Path("m.gguf").read_bytes()
    Path("m.gguf").write_bytes(data.replace(b"{{ messages }}", b"{{ massages }}"))
    refused(*words, words=("out.gguf: exists already, made with other metadata",))


def test_names_of_files_that_cannot_be() -> None:
    write_unknown_gguf(Path("m.gguf"))
    refused("pack", "m.gguf", "-o", "out.gguf", "--format", "ptq", words=("phi9",))
    write_gguf_file(Path("n.gguf"), tensors())
    refused("pack", "n.gguf", "-g", 4, "-o", "out.gguf", words=("-o out.gguf names a GGUF file",))
    refused("pack", "n.gguf", "-g", 4, "-o", "out.GGUF", words=("file ends with .gguf",))
    refused("dequantize", "n.gguf", "-o", "out.gguf", words=("-o out.gguf names a GGUF file",))
    refused(*PACK, "-o", "out.gguf", "--max-shard-size", "1KB", words=("out.gguf: one file",))
    Path("out.report.json").write_text("mine")
    refused(*PACK, "-o", "out.gguf", words=("out.report.json: exists already",))
    refused(*PACK, "-o", "m.gguf", words=("m.gguf: exists already",))
    refused(*PACK, "-o", "m.gguf", "--force", words=("m.gguf: holds", "which is being read"))


@pytest.mark.parametrize("fails", ["report", "file"])
def test_a_run_that_dies_while_it_gives_names(fails: str, monkeypatch: Any) -> None:
    write_unknown_gguf(Path("m.gguf"))
    words, real = (*PACK, "-o", "out.gguf"), os.rename if fails == "file" else os.replace

    def dying(source: Any, target: Any) -> None:
        if str(target).endswith(("out.gguf", "out.report.json")):
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename" if fails == "file" else "replace", dying)
        assert ptq(*words).code == 1
    assert Path("out.report.json").exists() == (fails == "file")
    assert not Path("out.gguf").exists()
    assert Path("out.gguf.partial").exists()
    assert ptq(*words).code == 0
    assert sorted(os.listdir()) == ["m.gguf", "out.gguf", "out.report.json"]


SHARDS = [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def in_shards() -> None:
    write_unknown_gguf(Path("m.gguf"))
    assert ptq(*PACK, "--max-shard-size", "15KB", "-o", "out").code == 0
    assert sorted(path.name for path in Path("out").glob("*.gguf")) == SHARDS


def test_several_files() -> None:
    in_shards()
    assert ptq(*PACK, "-o", "one").code == 0
    whole, names = stored("one/model.gguf"), []
    for number, own in enumerate(SHARDS):
        found, keys = stored(f"out/{own}"), key_values(f"out/{own}")
        size = sum(tensor.n_bytes for tensor in found.values())
        assert size <= 15000
        for name, tensor in found.items():
            assert tensor.data.tobytes() == whole[name].data.tobytes()
            assert tensor.tensor_type == whole[name].tensor_type
        names += list(found)
        fields = gguf.GGUFReader(f"out/{own}").fields
        split = {key: (fields[key].contents(), fields[key].types[0].name) for key in fields
                 if key.startswith("split.")}  # fmt: skip
        assert split == {
            "split.no": (number, "UINT16"), "split.count": (3, "UINT16"),
            "split.tensors.count": (len(whole), "INT32"),
        }  # fmt: skip
        assert ("phi9.uint8" in keys) == (number == 0)
    assert names == list(whole)


def test_several_files_are_read() -> None:
    in_shards()
    assert ptq("eval", "m.gguf", "out").code == 0
    assert ptq("eval", "m.gguf", f"out/{SHARDS[0]}").code == 0
    for place in ("out", f"out/{SHARDS[0]}"):  # and put together again
        assert ptq("rtn", place, "--format", "gguf", "-b", 8, "-g", 32, "-o", "whole.gguf",
                   "--force").code == 0  # fmt: skip
        assert list(stored("whole.gguf")) == list(stored("m.gguf"))
        given = key_values("m.gguf")
        assert not any(key.startswith("split.") for key in key_values("whole.gguf"))
        assert given.keys() <= key_values("whole.gguf").keys()


def patched(name: str, key: str, value: int) -> None:
    """Another number for a key of two bytes."""
    path = Path("out", name)
    data = path.read_bytes()
    place = data.index(key.encode()) + len(key) + 4
    path.write_bytes(data[:place] + value.to_bytes(2, "little") + data[place + 2 :])


@pytest.mark.parametrize(("damage", "words"), [
    (lambda: Path("out", SHARDS[1]).unlink(), "1 of 3 shards are missing: model-00002-of-00003"),
    (lambda: patched(SHARDS[2], "split.no", 1), "says that it is shard 1 of 3"),
    (lambda: patched(SHARDS[1], "split.count", 4), "says that it is shard 1 of 4"),
    (lambda: patched(SHARDS[0], "split.no", 1), "one file of 3 that hold a model"),
    (lambda: patched(SHARDS[0], "split.tensors.count", 1), "split.tensors.count is 1, but the sh"),
    (lambda: os.replace(f"out/{SHARDS[2]}", f"out/{SHARDS[1]}"), "shards are missing"),
    (lambda: os.rename(f"out/{SHARDS[0]}", "out/a.gguf"), "several candidates"),
    (lambda: Path("out", SHARDS[1]).write_bytes(b"GGUF"), "00002-of-00003.gguf: not a GGUF file"),
])  # fmt: skip
def test_shards_that_do_not_belong_together(damage: Any, words: str) -> None:
    in_shards()
    damage()
    refused("rtn", "out", "--format", "gguf", "-b", 8, "-g", 32, words=(words,))


def test_another_shard_than_the_first() -> None:
    in_shards()
    outcome = refused("rtn", f"out/{SHARDS[1]}", "--format", "gguf", words=("one file of 3",))
    assert "name the first" in outcome.err


@pytest.mark.slow
def test_smoothed_norms_are_written_too() -> None:
    half_sample(Path("s"))
    pack = ("pack", "s", "-b", 8, "-g", 32, "--format", "gguf")
    assert ptq(*pack, "-o", "m").code == 0
    tokens = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 1, "--parallel-layers")
    awq = ("awq", "m/model.gguf", *tokens, "-b", 4, "-g", 32, "--format", "gguf")
    outcome = ptq(*awq, "-o", "out")
    assert outcome.code == 0, outcome.err
    given, found = stored("m/model.gguf"), stored("out/model.gguf")
    assert list(found) == list(given)
    other = {n for n in given if given[n].data.tobytes() != found[n].data.tobytes()}
    norms = {name for name in other if name.endswith("_norm.weight")}
    assert norms
    assert {found[name].tensor_type.name for name in norms} == {"F32"}
    assert other - norms == {n for n in given if "attn_" in n or "ffn_" in n} - {
        name for name in given if name.endswith("_norm.weight")
    }
    refused(*awq, "-o", "out.gguf", words=("the factors of a smoothing go beside the weights",))
