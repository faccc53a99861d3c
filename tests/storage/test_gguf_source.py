"""A GGUF file as the model that it was made from."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.folded import folded_checkpoint
from ptq_cli.storage.gguf_file import TYPES
from ptq_cli.storage.gguf_source import GgufSource, open_gguf_source
from ptq_cli.storage.quantized import open_quantized
from ptq_cli.storage.sources import open_float
from tests.builders import ptq, random_weight
from tests.cli import tiny_folders
from tests.formats.cases import golden, vectors
from tests.refusals import refused
from tests.storage.gguf_files import HEAD, VOCAB, WIDTH, tensors, write_gguf_file

gguf = pytest.importorskip("gguf")

EMBEDDING, Q, K = ("model.embed_tokens.weight",
                   *(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk"))  # fmt: skip


@pytest.fixture(autouse=True)
def _here(here):
    """Every test in a folder of its own."""


def with_biases(path: Path, kind: str) -> Path:
    """A model folder of a family that has biases on q, k and v, or norms on heads, of its own."""
    blocks: dict[str, Any] = {}
    for number in range(2):
        own = f"model.layers.{number}."
        blocks |= tiny_folders.dense_block(own)
        attention = f"{own}self_attn."
        if kind == "qwen2":
            blocks |= {f"{attention}{n}_proj.bias": random_weight(64, seed=7) for n in "qkv"}
        if kind == "llama":
            blocks |= {f"{attention}{n}_proj.bias": random_weight(64, seed=7) for n in "qkvo"}
        if kind == "qwen3":
            blocks |= {f"{attention}{n}_norm.weight": random_weight(16, seed=7) for n in "qk"}
    more = {"attention_bias": True} if kind == "llama" else {}
    head = None if kind == "qwen3" else "lm_head"
    return tiny_folders.model_folder(
        path, kind, {**tiny_folders.ends(head=head), **blocks}, rope_theta=5e5, head_dim=16,
        tie_word_embeddings=head is None, **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", [[], ["--asym"], ["-b", 5], ["-b", 5, "--asym"], ["-b", 8]])
def test_what_was_written_comes_back(kind: str, options: list[object]) -> None:
    model = open_checkpoint(with_biases(Path("model"), kind))
    assert ptq("pack", "model", "-g", 32, "--format", "gguf", *options, "-o", "out").code == 0
    opened, packed = open_gguf_source(Path("out/model.gguf")), open_quantized(Path("out"))
    config = {**model.config, "num_hidden_layers": 2}
    assert {key: opened.config[key] for key in config} == config
    assert opened.config["architectures"] == [f"{kind.capitalize()}ForCausalLM"]
    assert {n: spec.shape for n, spec in opened.specs.items()} == {
        n: spec.shape for n, spec in model.specs.items()
    }
    for name, spec in opened.specs.items():
        module = name.removesuffix(".weight")
        if module not in packed.layers:
            stored = model.read(name).astype({"F16": np.float16, "F32": np.float32}[spec.dtype])
            np.testing.assert_array_equal(opened.read(name), stored)
            continue
        assert spec.dtype == "BF16"
        values = packed.load(module).dequantized()
        np.testing.assert_array_equal(opened.matrix(name, values.shape), values)
        rounded = values.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(opened.read(name), rounded)
        assert opened.read_bytes(name).tobytes() == opened.read(name).tobytes()


def test_a_folder_of_this_tool_keeps_its_config_json() -> None:
    with_biases(Path("model"), "llama")
    assert ptq("pack", "model", "-g", 32, "--format", "gguf", "-o", "out").code == 0
    stated = json.loads(Path("out/config.json").read_text())
    assert open_float(Path("out")).config == stated
    assert "vocab_size" in open_float(Path("out/model.gguf")).config
    assert open_float(Path("out")).root == Path("out")
    assert open_float(Path("out/model.gguf")).root is None


@pytest.mark.parametrize("name", vectors("ggml"))
def test_blocks_of_every_type(name: str) -> None:
    """Of the embedding, and of k, whose rows stand in another order in the file."""
    info, peer = golden(name)
    kind, values = info["type_name"], peer["dequant"]
    assert TYPES[info["ggml_type"]] == (kind, info["block"], info["bytes_per_block"])
    packed = dict.fromkeys(("token_embd.weight", "blk.0.attn_k.weight"), (kind, peer["packed"]))
    opened = open_gguf_source(write_gguf_file(Path("m.gguf"), tensors(), packed))
    np.testing.assert_array_equal(opened.matrix(EMBEDDING, (VOCAB, WIDTH)), values)
    np.testing.assert_array_equal(opened.matrix(K, (HEAD, WIDTH)), values[[0, 2, 1, 3]])


@pytest.mark.parametrize("name", vectors("ggml"))
def test_blocks_with_fields_at_random(name: str) -> None:
    info, peer = golden(name)
    n_blocks, blocks = len(peer["random"]), WIDTH // info["block"]
    rows = np.ascontiguousarray(peer["random"][: n_blocks - n_blocks % blocks])
    rows = rows.reshape(-1, blocks * info["bytes_per_block"])
    values = peer["random_dequant"].reshape(-1)[: len(rows) * WIDTH].reshape(-1, WIDTH)
    if not len(rows):  # blocks are too few for a row
        rows, values = np.tile(peer["random"].reshape(1, -1), 2), peer["random_dequant"]
        values = np.tile(values.reshape(1, -1), 2)
    arrays = tensors()
    packed = {"token_embd.weight": (info["type_name"], rows)}
    opened = open_gguf_source(write_gguf_file(Path("m.gguf"), arrays, packed))
    np.testing.assert_array_equal(opened.rows(EMBEDDING, values.shape)[:], values)


def test_types_are_as_large_as_the_library_has_them() -> None:
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    numbers = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
    for number, (name, block, width) in TYPES.items():
        assert (numbers[name], sizes[name]) == (number, (block, width))


def test_a_tensor_has_a_scale_of_its_own() -> None:
    _, peer = golden("ggml_nvfp4")
    packed = {"token_embd.weight": ("NVFP4", peer["packed"])}
    arrays = {**tensors(), "token_embd.scale": np.array([0.75], np.float32)}
    opened = open_gguf_source(write_gguf_file(Path("m.gguf"), arrays, packed))
    expected = peer["dequant"] * np.float32(0.75)
    np.testing.assert_array_equal(opened.matrix(EMBEDDING, (VOCAB, WIDTH)), expected)
    arrays["token_embd.scale"] = np.ones(2, np.float32)
    with pytest.raises(InputError, match=r"token_embd.scale' is F32 \[2\], not F32 \[1\]"):
        open_gguf_source(write_gguf_file(Path("n.gguf"), arrays, packed))


def test_what_a_worker_gets_is_small() -> None:
    _, peer = golden("ggml_q4_k")
    packed = {"blk.0.attn_k.weight": ("Q4_K", peer["packed"])}
    opened = open_gguf_source(write_gguf_file(Path("m.gguf"), tensors(), packed))
    assert opened.documents.keys() == {"config.json"}
    part = pickle.loads(pickle.dumps(opened.part([K])))
    assert isinstance(part, GgufSource)
    assert part.tensors.keys() == part.places.keys() == {K}
    np.testing.assert_array_equal(part.read(K), opened.read(K))
    assert len(pickle.dumps(opened.part([K]))) < 3000
    folded = folded_checkpoint(opened, ()).part([K])
    np.testing.assert_array_equal(folded.read(K), opened.read(K))
    assert len(pickle.dumps(folded)) < 4000


def test_the_fingerprint_tells_weights_apart() -> None:
    _, peer = golden("ggml_q4_k")
    prints = set()
    for change in range(2):
        data = peer["packed"].copy()
        data[-1, -1] ^= change
        packed = {"token_embd.weight": ("Q4_K", data)}
        file = write_gguf_file(Path(f"{change}.gguf"), tensors(), packed)
        prints.add(open_gguf_source(file).fingerprint)
    assert len(prints) == 2


def test_values_that_are_no_numbers_are_named() -> None:
    _, peer = golden("ggml_q4_k")
    data = peer["packed"].copy()
    data[1, 144:146] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)  # the second block's d
    packed = {"token_embd.weight": ("Q4_K", data)}
    opened = open_gguf_source(write_gguf_file(Path("m.gguf"), tensors(), packed))
    words = f"m.gguf: tensor '{EMBEDDING}': d of block 1 of row 1 is inf, no finite number"
    with pytest.raises(InputError, match=words):
        opened.matrix(EMBEDDING, (VOCAB, WIDTH))


def test_dequantized_by_the_command() -> None:
    _, peer = golden("ggml_q6_k")
    arrays = {**tensors(), "output.weight": tensors()["token_embd.weight"].astype(np.float16)}
    packed = {"blk.0.attn_k.weight": ("Q6_K", peer["packed"])}
    file = write_gguf_file(Path("m.gguf"), arrays, packed)
    outcome = ptq("dequantize", file, "-o", "out")
    assert outcome.code == 0
    assert "m.gguf: its tokenizer is left out: its kind is None" in outcome.err
    found, opened = open_checkpoint(Path("out")), open_gguf_source(file)
    assert found.config == opened.config
    assert {n: s.dtype for n, s in found.specs.items()} == {
        name: {K: "BF16", "lm_head.weight": "F16"}.get(name, "F32") for name in opened.specs
    }
    for name in opened.specs:
        assert found.read_bytes(name).tobytes() == opened.read_bytes(name).tobytes()
    rows = peer["dequant"][[0, 2, 1, 3]].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found.read(K), rows)


@pytest.mark.parametrize("kind", ["NVFP4", None])
def test_what_is_not_repacked_is_inspected_and_rounded(kind: str | None) -> None:
    """Floats; and NVFP4 where a tensor has a scale of its own."""
    arrays, packed = tensors(), {}
    if kind is not None:
        packed = {"blk.0.attn_k.weight": (kind, golden("ggml_nvfp4")[1]["packed"])}
        arrays["blk.0.attn_k.scale"] = np.array([0.5], np.float32)
    write_gguf_file(Path("m.gguf"), arrays, packed)
    document = ptq("inspect", "m.gguf", "--json").document
    assert document["family"] == "llama"
    assert {entry["tensor"] for entry in document["tensors"]} >= {EMBEDDING, Q, K}
    outcome = ptq("pack", "m.gguf", "-b", 8, "-g", 4, "-o", "out")
    assert (outcome.code, "GGUF, NVFP4" in outcome.err) == (0, kind is not None)
    assert ptq("eval", "m.gguf", "out", "--max-rel-err", "1e-4").code == 0


def test_a_file_of_floats_becomes_a_folder_too() -> None:
    outcome = ptq("dequantize", write_gguf_file(Path("m.gguf"), tensors()), "-o", "out")
    assert (outcome.code, "0 of 11 tensors decoded (float)" in outcome.out) == (0, True)
    expected = tensors()["blk.0.attn_q.weight"].reshape(2, 2, 2, WIDTH).swapaxes(1, 2)
    np.testing.assert_array_equal(open_checkpoint(Path("out")).read(Q), expected.reshape(8, WIDTH))


def write(path: str = "m.gguf", drop: str = "", **keys: Any) -> Path:
    arrays = tensors()
    arrays.pop(drop, None)
    extra = {key: keys.pop(key) for key in list(keys) if isinstance(keys[key], np.ndarray)}
    arrays |= {key.replace("__", "."): array for key, array in extra.items()}
    return write_gguf_file(Path(path), arrays, **keys)


@pytest.mark.parametrize(("change", "words"), [
    ({"architecture": "phi9"}, ("general.architecture 'phi9' is not understood",)),
    ({"block_count": None}, ("llama.block_count is missing",)),
    ({"block_count": 2}, ("'blk.1.", "is missing")),
    ({"block_count": 2**32 - 1}, ("block_count is 4294967295, but there are 11 tensors",)),
    ({"expert_count": 4}, ("'blk.0.ffn_", "is not understood")),
    ({"drop": "blk.0.attn_v.weight"}, ("'blk.0.attn_v.weight' is missing",)),
    ({"drop": "token_embd.weight"}, ("'token_embd.weight' is missing",)),
    ({"blk__0__ssm__weight": np.ones(4, np.float32)}, ("'blk.0.ssm.weight' is not understood",)),
    ({"blk__0__attn_q__bias": np.ones(8, np.float32)}, ("k_proj lacks its bias", "llama")),
    ({"attention.head_count_kv": 3}, ("does not hold 3 heads",)),
    ({"rope_freqs__weight": np.full(2, 1.5, np.float32)}, ("rope_freqs.weight", "Llama 3")),
])  # fmt: skip
def test_models_that_are_not_understood(change: dict[str, Any], words: tuple[str, ...]) -> None:
    write(**change)
    refused("rtn", "m.gguf", words=("m.gguf", *words))


@pytest.mark.parametrize(("damage", "words"), [
    (lambda data: data[:-1000], "cut short"),
    (lambda data: data[:100], "cut short"),
    (lambda data: data[:10], "not a GGUF file"),
    (lambda data: b"GGML" + data[4:], "not a GGUF file"),
    (lambda data: data[:4] + b"\x07" + data[5:], "version 7 is not understood"),
    (lambda data: data + bytes(100), "followed by other bytes"),
    (lambda data: data.replace(b"block_count", b"block_c\xffunt"), "not UTF-8"),
])  # fmt: skip
def test_damaged_files(damage: Any, words: str) -> None:
    file = write()
    file.write_bytes(damage(file.read_bytes()))
    refused("rtn", "m.gguf", words=("m.gguf", words))
    assert not list(Path().glob("m-rtn*"))


def with_key(key: bytes, value: bytes) -> Any:
    """Puts one more key-value before the others. value: its kind, too"""

    def change(data: bytes) -> bytes:
        count = (int.from_bytes(data[16:24], "little") + 1).to_bytes(8, "little")
        return data[:16] + count + len(key).to_bytes(8, "little") + key + value + data[24:]

    return change


def words(*numbers: int) -> bytes:
    """A kind, U32, and what follows it, U64 each."""
    kind, *others = numbers
    return kind.to_bytes(4, "little") + b"".join(n.to_bytes(8, "little") for n in others)


@pytest.mark.parametrize(("change", "said"), [
    (lambda d: d[:4] + d[7:3:-1] + d[8:], "big endian"),
    (lambda d: d[:8] + (2**40).to_bytes(8, "little") + d[16:], "a count of 1099511627776"),
    (lambda d: d[:8] + (14).to_bytes(8, "little") + d[16:], "m.gguf"),
    (lambda d: d[:16] + (2**20).to_bytes(8, "little") + d[24:], "m.gguf"),
    (with_key(b"a", words(8, 2**60)), "cut short"),
    (with_key(b"a", words(9) + words(8, 2**40)), "a count of"),
    (with_key(b"a", words(9) + words(9, 1) * 40), "a value of kind 9"),
    (with_key(b"a", words(77)), "a value of kind 77"),
    (with_key(b"llama.block_count", words(4)[:4] + words(1)), "stands twice"),
    (with_key(b"general.alignment", words(4)[:4] + words(0)), "general.alignment is 0, no power"),
    (with_key(b"general.alignment", words(4)[:4] + words(48)), "general.alignment is 48, no po"),
    (with_key(b"general.alignment", words(8, 2) + b"32"), "general.alignment is 32, no power"),
])  # fmt: skip
def test_headers_that_lie(change: Any, said: str) -> None:
    file = write()
    file.write_bytes(change(file.read_bytes()))
    for options in ((), ("--format", "gguf", "-g", 32)):
        refused("rtn", "m.gguf", *options, words=("m.gguf", said))


def test_an_unknown_type_of_blocks() -> None:
    file = write()
    data = file.read_bytes()
    name = b"token_embd.weight"
    place = data.index(name) + len(name) + 4 + 16  # rank, two sizes
    file.write_bytes(data[:place] + (99).to_bytes(4, "little") + data[place + 4 :])
    refused("rtn", "m.gguf", words=("m.gguf", "'token_embd.weight'", "ggml's type 99"))


def test_version_2_has_the_same_layout() -> None:
    file = write()
    data = file.read_bytes()
    file.write_bytes(data[:4] + b"\x02" + data[5:])
    assert EMBEDDING in open_gguf_source(file).tensors
