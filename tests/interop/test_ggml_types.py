"""Every type of GGUF in ggml, gguf-py, llama.cpp and transformers: bytes of this tool's encoders
decode to exactly the weights they were made of, and models of them run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_cli.core.layer import Layer
from ptq_cli.errors import InputError
from ptq_cli.formats import gguf
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.gguf_model import GgufOutput, write_gguf_model
from ptq_cli.storage.tensors import as_bytes
from tests.builders import write_model
from tests.formats.ggml_weights import ggml_layer, ggml_weight
from tests.interop import ggml
from tests.interop.clients import PROMPT, transformers_plain

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "xllamacpp", "gguf"))),
        reason="needs the extra interop",
    ),
]
SAMPLE = Path(__file__).parent.parent.parent / "sample_data"
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 512, "vocab_size": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 128, "tie_word_embeddings": True, "dtype": "float16",
    "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TYPES))
def test_ggml_and_gguf_py_decode_the_same_values(name: str) -> None:
    import gguf as library

    for seed, spread in enumerate((0.02, 2e-4, 50.0)):  # 2e-4: d of float16 is subnormal
        own = ggml_layer(name, (32, 512))
        weight = ggml_weight(own, seed, spread)
        (packed,) = gguf.FORMAT.encode(own, weight).values()
        values = weight.dequantized()
        assert ggml.is_valid(name, packed)
        np.testing.assert_array_equal(ggml.decoded(name, packed, 512), values)
        theirs = library.dequantize(packed, library.GGMLQuantizationType[name])
        np.testing.assert_array_equal(theirs, values)


@pytest.mark.parametrize("name", list(TYPES))
def test_what_ggml_refuses_is_refused(name: str) -> None:
    """Bytes at random: every float of a block may be anything."""
    own, kind = ggml_layer(name, (1, 512)), TYPES[name]
    random, refused = np.random.default_rng(1), 0
    for _ in range(200):
        packed = random.integers(0, 256, (1, 512 // kind.block * kind.nbytes)).astype(np.uint8)
        blocks = packed.view(kind.parts)
        few = 0.5 / blocks.size
        for part, word, _ in kind.layout:
            if word == "<f2":
                values, shares = [1e-3, -1e-3, np.inf, np.nan], [0.5 - few, 0.5 - few, few, few]
                blocks[part] = random.choice(values, blocks.shape, p=shares)
        if name == "MXFP4":
            blocks["d"] = random.choice([1, 252, 255], blocks.shape, p=[0.5, 0.5 - few, few])
        if name == "NVFP4":
            blocks["d"] &= 0x7F  # ggml does not look at the sign, which no writer sets
        if ggml.is_valid(name, packed):
            back = gguf.FORMAT.decode(own, {f"{own.module}.weight": packed})
            np.testing.assert_array_equal(back.dequantized(), ggml.decoded(name, packed, 512))
        else:
            refused += 1
            with pytest.raises(InputError, match="no finite number"):
                gguf.FORMAT.decode(own, {f"{own.module}.weight": packed})
    assert (0 < refused < 200) or name == "NVFP4"


def layers_of(*names: str) -> dict[str, Layer]:
    """The model's matrices, of these types one after the other."""
    modules = {
        f"model.layers.{i}.{part}": shape for i in range(2) for part, shape in SHAPES.items()
    }
    modules |= {"model.embed_tokens": (2048, 256)}
    kinds = zip(modules.items(), cycle(names), strict=False)
    return {module: ggml_layer(name, shape, module) for (module, shape), name in kinds}


def write_types(names: list[str], source: Path, out: Path) -> NDArray[np.float32]:
    """Write a model whose matrices are of these types; what the NumPy forward gives of what they
    decode to, float32 [1, length, vocabulary]."""
    checkpoint, layers, parts, weights = open_checkpoint(source), layers_of(*names), [], {}
    for seed, (module, layer) in enumerate(layers.items()):
        weight = ggml_weight(layer, seed, 0.06 if module.endswith("embed_tokens") else 0.02)
        packed = gguf.FORMAT.encode(layer, weight)
        parts.append((module, [as_bytes(key, values) for key, values in packed.items()]))
        weights[f"{module}.weight"] = weight.dequantized()
    for key in checkpoint.tensors:
        if key not in weights:
            weights[key] = checkpoint.read(key)
            parts.append((key, [as_bytes(key, weights[key])]))
    out.mkdir()
    write_gguf_model(GgufOutput(out / "model.gguf"), parts, layers, gguf.FORMAT, checkpoint)
    architecture, tokens = read_architecture(CONFIG, weights), np.array(PROMPT)
    packing = pack(tokens.shape, np.ones_like(tokens))
    hidden = embed(architecture, weights, tokens, packing)
    for index in range(2):
        hidden = forward_block(architecture, index, weights, hidden, packing)
    return logits(architecture, weights, finish(architecture, weights, hidden))[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the float model, whose matrices are zero."""
    folder = tmp_path_factory.mktemp("float")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SAMPLE / name).read_bytes())
    tensors = {
        f"{module}.weight": np.zeros(layer.shape, np.float16)
        for module, layer in layers_of("Q4_0").items()
    }
    norms = [
        f"model.layers.{i}.{n}_layernorm" for i in range(2) for n in ("input", "post_attention")
    ]
    tensors |= {f"{norm}.weight": np.ones(256, np.float32) for norm in (*norms, "model.norm")}
    write_model(folder / "model.safetensors", tensors)
    return folder


def log_probabilities(values: NDArray[Any]) -> NDArray[Any]:
    shifted = values - values.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("name", list(TYPES))
def test_llama_cpp(name: str, source: Path, tmp_path: Path) -> None:
    ours = write_types([name], source, tmp_path / "out")
    theirs = ggml.logits(tmp_path / "out" / "model.gguf", PROMPT[0], CONFIG["vocab_size"])
    one, other = log_probabilities(ours[0]), log_probabilities(theirs)
    print(f"{name}: at most {np.abs(one - other).max():.3f}, spread {one.std():.2f}")
    assert one.std() > 0.8  # they are not all alike
    assert np.abs(one - other).max() < 0.1


def test_a_model_of_all_types(source: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "out", layers_of(*TYPES)
    assert {layer.grid for layer in own.values()} == {kind.grid for kind in TYPES.values()}
    ours = write_types(list(TYPES), source, out)
    theirs, _ = transformers_plain({"folder": out, "gguf": True})
    assert np.linalg.norm(theirs - ours) / np.linalg.norm(ours) < 1e-5
    found = ggml.logits(out / "model.gguf", PROMPT[0], CONFIG["vocab_size"])
    assert np.abs(log_probabilities(found) - log_probabilities(ours[0])).max() < 0.1
