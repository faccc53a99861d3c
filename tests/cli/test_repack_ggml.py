"""`ptq pack` of GGUF's types: every byte is kept in the native format and back; formats that do not
hold them say so in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.formats import gguf
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.storage.gguf_file import read_gguf_header
from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq
from tests.formats.ggml_weights import ggml_layer, ggml_weight, same_numbers
from tests.storage.gguf_files import (
    HEAD,
    HEADS,
    INNER,
    SHAPES,
    VOCAB,
    WIDTH,
    tensors,
    write_gguf_file,
)

pytest.importorskip("gguf")

CONFIG = {
    "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 1, "head_dim": HEAD,
    "num_attention_heads": HEADS, "num_key_value_heads": 1, "intermediate_size": INNER,
    "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "hidden_act": "silu",
    "tie_word_embeddings": True, "dtype": "float16",
}  # fmt: skip
PLACES = [name for name, shape in SHAPES.items() if shape[1:] == (WIDTH,)]
K_PROJ = "model.layers.0.self_attn.k_proj"


@pytest.fixture(autouse=True)
def _here(here):
    """Every test in a folder of its own."""


def model(*names: str, **changed: np.ndarray) -> Path:
    """A folder with a GGUF file whose matrices are of these types, one after the other."""
    packed = {}
    for seed, (place, name) in enumerate(zip(PLACES, names, strict=False)):
        if name == "F32":
            continue
        own = ggml_layer(name, SHAPES[place])
        (data,) = gguf.FORMAT.encode(own, ggml_weight(own, seed)).values()
        packed[f"{place}.weight"] = (name, changed.get(name, data))
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    write_gguf_file(Path("model/model.gguf"), tensors(), packed)
    return Path("model")


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Types and bytes of what is quantized in a GGUF file."""
    data = path.read_bytes()
    return {
        tensor.spec.name: (tensor.spec.dtype, data[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor in read_gguf_header(path).tensors
        if tensor.spec.dtype in TYPES
    }


@pytest.mark.parametrize("first", [0, 5, 10])
def test_every_byte_is_kept(first: int) -> None:
    names = [*TYPES, *TYPES][first : first + len(PLACES)]
    folder = model(*names)
    assert len(stored(folder / "model.gguf")) == len(PLACES) == len(names)
    for source, name, out in (("model", "ptq", "native"), ("native", "gguf", "back")):
        outcome = ptq("pack", source, "--format", name, "-o", out)
        assert outcome.code == 0, outcome.err
    assert stored(Path("back/model.gguf")) == stored(folder / "model.gguf")
    one, other = open_quantized(folder), open_quantized(Path("native"))
    for module, layer in one.layers.items():
        ours, theirs = one.load(module), other.load(module)
        np.testing.assert_array_equal(ours.dequantized(), theirs.dequantized())
        if not layer.grid.mirrored and layer.grid.scale_dtype != "float16":
            same_numbers(ours, theirs)


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_other_formats_refuse_them_in_one_line(kind: str) -> None:
    folder = model("F32", kind)
    outcome = ptq("pack", folder, "--format", "gptq_v2", "-o", "out")
    assert (outcome.code, Path("out").exists()) == (1, False)
    message, *hints = outcome.err.splitlines()
    assert message.startswith("ptq: error: format gptq_v2 cannot hold 1 of 1 layers: ")
    assert "q_proj" in message
    assert all(line.startswith("ptq: hint: ") for line in hints)
    for options in (["-g", 128], ["--scale-dtype", "float32"]):
        outcome = ptq("pack", folder, "--format", "ptq", *options, "-o", "out")
        assert outcome.code == 1
        assert "multiples of super-blocks', and stay in groups of" in outcome.err


@pytest.mark.parametrize("command", ["pack", "dequantize", "rtn", "eval"])
def test_blocks_that_mean_no_number(command: str) -> None:
    own = ggml_layer("Q4_K", SHAPES["blk.0.attn_k"])
    (data,) = gguf.FORMAT.encode(own, ggml_weight(own)).values()
    data.view(TYPES["Q4_K"].parts)["dmin"][3, 1] = np.nan
    folder = model("F32", "F32", "Q4_K", Q4_K=data)
    outcome = ptq(command, folder, *([folder] if command == "eval" else ["-o", "out"]))
    assert (outcome.code, Path("out").exists()) == (1, False)
    words = f"tensor '{K_PROJ}.weight': dmin of block 1 of row 3 is nan, no finite number"
    assert words in outcome.err
    assert "model/model.gguf" in outcome.err


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_small_floats_change_their_files_without_loss(kind: str) -> None:
    """FP4 of GGUF is compressed-tensors' and MLX's, block by block."""
    folder = model("F32", *[kind] * 5)
    for source, name, out in (
        (folder, "compressed-tensors", "ct"), ("ct", "mlx", "mlx"), ("mlx", "gguf", "back")
    ):  # fmt: skip
        outcome = ptq("pack", source, "--format", name, "-o", out)
        assert outcome.code == 0, outcome.err
    assert stored(Path("back/model.gguf")) == stored(folder / "model.gguf")


@pytest.mark.parametrize("first", [0, 6, 9])
def test_they_are_said_to_load_where_tests_load_them(first: int) -> None:
    folder = model(*[*TYPES][first : first + len(PLACES)])
    for runtime in ("llama.cpp", "transformers"):
        document = ptq("check", folder, "--runtime", runtime, "--json").document
        assert (document["verdict"], document["why"]) == ("loaded in our tests", None)
