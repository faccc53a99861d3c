"""`ptq pack` of quantized folders: lossless, or refused with every layer and its reason."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli import registry
from ptq_cli.commands import quantize
from ptq_cli.run import repack
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq

pytest.importorskip("gguf")
pytest.importorskip("onnx")

FORMATS = ("ptq", "gptq", "gptq_v2", "awq", "compressed-tensors", "mlx", "gguf", "onnx")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def half(one_block, tmp_path_factory):
    """One block of the sample as a float16 model, in which every layout of scales is at home."""
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("half") / "sample"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((one_block / name).read_bytes())
    config = json.loads((one_block / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert ml_dtypes
    tensors = {
        k: v.astype(np.float16) for k, v in load_file(one_block / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def values(path):
    folder = open_quantized(Path(path))
    return {module: folder.load(module) for module in folder.layers}


def same_values(first, second):
    ours, theirs = values(first), values(second)
    assert ours.keys() == theirs.keys()
    for module, weight in ours.items():
        np.testing.assert_array_equal(weight.codes, theirs[module].codes)
        np.testing.assert_array_equal(weight.dequantized(), theirs[module].dequantized())


def pack(*arguments, code=0, words=()):
    outcome = ptq("pack", *arguments)
    assert outcome.code == code, outcome.err
    for word in words:
        assert word in outcome.err
    return outcome


@pytest.mark.parametrize("there", FORMATS)
def test_there_and_back(half, there, check_report):
    ptq("rtn", half, "-g", 64, "--format", "gptq", "-o", "first")
    outcome = pack("first", "--format", there, "-o", "second", "--json")
    report = check_report(outcome.document)
    assert report["totals"]["worst_rel_err"] == 0.0
    pack("second", "--format", "gptq", "-o", "third")
    same_values("first", "second")
    same_values("first", "third")
    assert (
        Path("third/quantize_config.json").read_text()
        == Path("first/quantize_config.json").read_text()
    )
    first, third = (json.loads(Path(f, "config.json").read_text()) for f in ("first", "third"))
    assert first["quantization_config"] == third["quantization_config"]
    assert "quantization" not in third
    assert ptq("eval", half, "third", "--json").document["settings"]["format"] == "gptq"
    if there != "gguf":
        tensors = [Path(folder, "model.safetensors").read_bytes() for folder in ("first", "third")]
        assert tensors[0] == tensors[1]


def test_asymmetric(half):
    ptq("rtn", half, "-g", 32, "--asym", "--format", "awq", "-o", "first")
    for there in ("ptq", "gptq_v2", "compressed-tensors", "onnx"):
        pack("first", "--format", there, "-o", there)
        same_values("first", there)
    pack("first", "--format", "gguf", "-o", "x", code=1, words=["would round −zero · scale"])
    pack("first", "--format", "mlx", "-o", "x", code=1, words=["--scale-dtype float32"])
    pack("first", "--format", "mlx", "--scale-dtype", "float32", "-o", "mlx")
    same_values("first", "mlx")
    pack("first", "--format", "gptq", "-o", "x", code=1, words=["--format gptq_v2"])


def test_every_layer_that_does_not_fit_is_listed_before_any_work(sample):
    recipe = 'bits = 4\ngroup_size = 32\n[[layers]]\nmatch = "down_proj"\nbits = 3\n'
    Path("recipe.toml").write_text(recipe)
    assert ptq("rtn", sample, "--config", "recipe.toml", "-o", "first").code == 0
    downs = [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    named = "2 of 14 layers: awq holds 4 bits, not 3: model.layers.{0-1}.mlp.down_proj"
    outcome = pack("first", "--format", "awq", "-o", "out", code=1, words=[named])
    assert (
        "\nptq: hint: --bits 4 when the float model is quantized, or --on-misfit keep"
        in outcome.err
    )
    assert len(outcome.err.splitlines()) == 2
    assert not Path("out").exists()
    assert not Path("out.partial").exists()
    pack("first", "--format", "awq", "--on-misfit", "keep", "-o", "out")
    config = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert set(config["modules_to_not_convert"]) == {*downs, "lm_head"}
    folder = open_quantized(Path("out"))
    assert set(folder.layers) == set(values("first")) - set(downs)
    stored = folder.checkpoint.tensors[f"{DOWN}.weight"].spec
    assert (stored.dtype, stored.shape) == ("BF16", (128, 384))
    kept = folder.checkpoint.read(f"{DOWN}.weight").astype(np.float32)
    np.testing.assert_allclose(kept, values("first")[DOWN].dequantized(), rtol=2**-8)


def test_mirrored_groups_where_the_target_holds_none(sample, monkeypatch):
    """Said in a line, with what helps; formats that hold them get them as they are."""
    assert ptq("pack", sample, "-o", "first").code == 0
    pack("first", "--format", "ptq", "-g", 64, "-o", "second")
    same_values("first", "second")
    layers = open_quantized(Path("second")).layers.values()
    assert {(layer.grid.mirrored, layer.grid.group_size) for layer in layers} == {(True, 64)}
    none = replace(registry.format_named("mlx"), mirrored=lambda layer: False)
    monkeypatch.setattr(quantize, "format_named", lambda name: none)
    outcome = pack("first", "--format", "mlx", "-o", "third", code=1)
    assert outcome.errors == [
        "ptq: error: format mlx cannot hold 14 of 14 layers: mlx cannot hold mirrored groups (zeros"
        " of 7 beside 8): model.layers.{0-1}.{mlp.{down,gate,up}_proj, self_attn.{k,o,q,v}_proj};"
        " quantize the float model again with --format mlx"
    ]
    outcome = pack("first", "--format", "mlx", "-o", "third", "--on-misfit", "keep", code=1)
    assert "mirrored groups" in outcome.err


def test_scales_that_the_target_cannot_hold(one_block):
    ptq("rtn", one_block, "--format", "gptq", "-o", "first")
    words = ["some of which bfloat16 cannot hold", "--scale-dtype bfloat16"]
    pack("first", "--format", "compressed-tensors", "-o", "out", code=1, words=words)
    ptq("rtn", one_block, "--scale-dtype", "bfloat16", "-o", "second")
    pack("second", "--format", "compressed-tensors", "-o", "out")
    same_values("second", "out")


def test_groups(one_block):
    ptq("rtn", one_block, "-g", -1, "-o", "first")
    pack("first", "--format", "mlx", "-o", "x", code=1, words=["--group-size 128"])
    pack("first", "--format", "mlx", "--group-size", 128, "-o", "second")
    same_values("first", "second")
    pack("second", "--format", "ptq", "--group-size", -1, "-o", "third")
    same_values("first", "third")
    ptq("rtn", one_block, "-g", 32, "-o", "fine")
    words = ["groups of 32 columns do not fit into groups of 64"]
    pack("fine", "--format", "ptq", "--group-size", 64, "-o", "x", code=1, words=words)


@pytest.mark.parametrize("misfit", ["error", "keep"])
@pytest.mark.parametrize(("there", "size"), [("gguf", 32), ("mlx", 128)])
def test_groups_too_small_are_for_the_float_model(there, size, misfit, one_block):
    """Groups can be split, and are joined only where they are equal."""
    ptq("rtn", one_block, "-g", 16, "-o", "g16")
    again = f"hint: --group-size {size} when the float model is quantized"
    outcome = pack("g16", "--format", there, "--on-misfit", misfit, "-o", "x", code=1, words=["16"])
    assert again in outcome.err
    outcome = pack("g16", "--format", there, "-g", size, "-o", "x", code=1, words=["do not fit"])
    assert again in outcome.err
    assert ptq("rtn", one_block, "-g", size, "--format", there, "-o", "again").code == 0


def test_act_order_goes_to_gptq_only(one_block):
    assert ptq("gptq", one_block, "--act-order", "desc", "-o", "first").code == 0
    pack("first", "--format", "gptq", "-o", "second")
    same_values("first", "second")
    for there in ("awq", "compressed-tensors", "mlx", "gguf", "onnx"):
        pack("first", "--format", there, "-o", "x", code=1, words=["no g_idx", "--format gptq"])
    words = ["columns were reordered"]
    pack("first", "--format", "gptq", "-g", 64, "-o", "x", code=1, words=words)


def test_codes_stay(one_block):
    ptq("rtn", one_block, "-o", "first")
    words = ["--bits", "start from the float model"]
    pack("first", "--bits", 3, "-o", "x", code=1, words=words)
    pack("first", "-o", "first", "--force", code=1, words=["being read"])


def test_a_name_by_default(one_block):
    ptq("rtn", one_block, "-o", "first")
    pack("first", "--format", "awq")
    same_values("first", "first-awq")


def test_quantize_config_beside(sample):
    ptq("rtn", sample, "--format", "gptq", "-o", "first")
    path = Path("first/config.json")
    config = json.loads(path.read_text())
    declared = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    assert len(values("first")) == 14
    beside = Path("first/quantize_config.json")
    beside.write_text(json.dumps({k: v for k, v in declared.items() if k != "quant_method"}))
    assert len(values("first")) == 14
    path.write_text(json.dumps({**config, "quantization_config": {**declared, "bits": 8}}))
    with pytest.raises(ptq_cli.PtqError, match=r"quantize_config\.json differ in bits"):
        values("first")


def test_gguf_files(one_block):
    assert ptq("rtn", one_block, "--format", "gguf", "-o", "out").code == 0
    report = ptq("eval", one_block, "out/model.gguf", "--json").document
    assert not [text for text in report["warnings"] if "differ" in text]
    assert {row["group_size"] for row in report["layers"]} == {128}
    Path("bare").mkdir()
    Path("bare/model.safetensors").write_bytes((one_block / "model.safetensors").read_bytes())
    outcome = ptq("rtn", "bare/model.safetensors", "--format", "gguf", "-o", "x")
    assert (outcome.code, "config.json" in outcome.err) == (1, True)


def damaged(data: bytearray, number: int) -> bytes:
    at = {"magic": 0, "version": 4, "tensors": 8, "values": 16, "key": 24}
    if number == 0:
        data[0] = 0
    elif number == 1:
        data[at["version"] : 8] = struct.pack("<I", 1)  # whose counts are half as wide
    elif number < 5:
        start = list(at.values())[number]
        data[start : start + 8] = struct.pack("<Q", 2**60)
    elif number == 5:
        del data[-64:]
    elif number == 6:
        data += b"\0" * 64
    else:
        start = data.index(b"blk.0.attn_q.weight") + 19
        field = {7: (0, "<I", 9), 8: (4, "<Q", 33), 9: (20, "<I", 99), 10: (24, "<Q", 32)}[number]
        offset, kind, value = field
        data[start + offset : start + offset + struct.calcsize(kind)] = struct.pack(kind, value)
    return bytes(data)


def test_dense_rows_of_a_gguf_file_come_back_in_order(half):
    """llama.cpp wants the rows of q and k in another order; other layouts do not."""
    own = ["rtn", half, "--group-size", "32", "--ignore", "[qk]_proj", "--format", "gguf"]
    assert ptq(*own, "-o", "first").code == 0
    pack("first", "--format", "ptq", "-o", "second")
    original, back = open_checkpoint(half), open_quantized(Path("second")).checkpoint
    for name in ("q_proj", "k_proj"):
        tensor = f"model.layers.0.self_attn.{name}.weight"
        np.testing.assert_array_equal(original.read(tensor), back.read(tensor))


@pytest.mark.parametrize("number", range(11))
def test_damaged_gguf_files(sample, made, number):
    shutil.copytree(made("rtn", "--format", "gguf"), "out")
    path = Path("out/model.gguf")
    path.write_bytes(damaged(bytearray(path.read_bytes()), number))
    outcome = ptq("eval", sample, "out")
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert "model.gguf" in outcome.err
    assert "internal error" not in outcome.err


def test_the_whole_file_by_ggufwriter():
    """Our reader and our writer on the peer's file."""
    from safetensors.numpy import load_file

    from ptq_cli.storage.gguf_file import read_gguf_header
    from ptq_cli.storage.gguf_write import Outgoing, encoded_keys, write_gguf

    golden = Path(__file__).parent.parent / "golden"
    arrays = load_file(golden / "gguf_file_by_ggufwriter.safetensors")
    header = read_gguf_header(golden / "gguf_file_by_ggufwriter.gguf")
    data = (golden / "gguf_file_by_ggufwriter.gguf").read_bytes()
    ordered = [arrays["q4_0"], arrays["b"], arrays["a"].astype(np.float16)]
    for tensor, own in zip(header.tensors, ordered, strict=True):
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == own.tobytes()
    tensors = [Outgoing(tensor.spec, tensor.nbytes) for tensor in header.tensors]
    keys = encoded_keys(header.metadata)
    assert keys == {key: header.encoded(key) for key in header.metadata}
    write_gguf(Path("own.gguf"), keys, tensors, ordered)
    assert Path("own.gguf").read_bytes() == data


def test_what_is_packed_already_is_not_converted_again(one_block, monkeypatch):
    assert ptq("pack", one_block, "-o", "first").code == 0
    words = ("pack", "first", "--format", "mlx", "-g", 128, "-o", "second")
    assert ptq(*words).code == 0
    monkeypatch.setattr(repack, "convert", None)
    again = ptq(*words)
    assert again.code == 0, again.err
    assert "second: finished already" in again.err
