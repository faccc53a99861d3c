"""GGUF in, GGUF out in llama.cpp: an architecture that this tool does not know, in one file and in
several; and importance matrices for ggml's own quantizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import SAMPLE, half_sample, ptq
from tests.interop import ggml

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not all(map(find_spec, ("xllamacpp", "gguf"))), reason="needs the extra interop"
    ),
]
WIDTH, INNER, EXPERTS, BLOCKS, VOCAB = 256, 256, 3, 2, 256
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 48).tolist()


def olmoe(path: Path, decoded: dict[str, NDArray[Any]] | None = None) -> None:
    """An OLMoE with norms on heads, and a router; decoded: values to have in place of its own."""
    import gguf

    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "olmoe")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(EXPERTS)  # or 8 bits of the inputs choose others
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(shape[-1] ** -0.5)
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        writer.add_tensor(f"{name}.weight", (decoded or {}).get(f"{name}.weight", values))

    add("token_embd", VOCAB, WIDTH)
    for block in range(BLOCKS):
        for name in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
            add(f"blk.{block}.{name}", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}", WIDTH, WIDTH)
        add(f"blk.{block}.ffn_gate_inp", EXPERTS, WIDTH)
        add(f"blk.{block}.ffn_gate_exps", EXPERTS, INNER, WIDTH)
        add(f"blk.{block}.ffn_up_exps", EXPERTS, INNER, WIDTH)
        add(f"blk.{block}.ffn_down_exps", EXPERTS, WIDTH, INNER)
    add("output_norm", WIDTH)
    add("output", VOCAB, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def values_of(path: Path) -> dict[str, NDArray[Any]]:
    import gguf

    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("options", [
    ("--format", "gguf", "-b", 4, "-g", 32), ("--scheme", "Q4_K_M"),
])  # fmt: skip
def test_llama_cpp_runs_what_the_decoded_weights_compute(
    tmp_path: Path, options: tuple[object, ...]
) -> None:
    olmoe(tmp_path / "float.gguf")
    assert ptq("rtn", tmp_path / "float.gguf", *options, "-o", tmp_path / "out.gguf").code == 0
    shards = ("--max-shard-size", "300KB", "-o", tmp_path / "shards")
    assert ptq("rtn", tmp_path / "float.gguf", *options, *shards).code == 0
    olmoe(tmp_path / "decoded.gguf", values_of(tmp_path / "out.gguf"))
    expected, found = (
        ggml.logits(tmp_path / f"{name}.gguf", TOKENS, VOCAB) for name in ("decoded", "out")
    )
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{options}: {error:.2e}")
    assert error < 3e-2  # it rounds inputs to 8 bits
    first, *others = sorted((tmp_path / "shards").glob("*.gguf"))
    assert len(others) > 2
    np.testing.assert_array_equal(ggml.logits(first, TOKENS, VOCAB), found)


def test_ggmls_quantizer_takes_an_importance_matrix(tmp_path: Path) -> None:
    """Errors of the outputs are less with it than without."""
    import gguf

    half_sample(tmp_path / "model")
    words = ("--tokens", SAMPLE / "calibration_tokens.npy", "--nsamples", 8)
    outs = ("-o", tmp_path / "s.safetensors", "--imatrix-out", tmp_path / "imatrix.gguf")
    assert ptq("calibrate", tmp_path / "model", *words, *outs).code == 0
    entries = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    sums, counts = (entries[f"blk.0.ffn_down.weight.{x}"] for x in ("in_sum2", "counts"))
    means = (sums / counts)[0]
    name = "model.layers.0.mlp.down_proj.weight"
    weight = open_checkpoint(tmp_path / "model").read(name).astype(np.float32)

    def error(importance: NDArray[np.float32]) -> float:
        packed = ggml.quantized("Q4_0", weight, importance)
        difference = weight - ggml.decoded("Q4_0", packed, weight.shape[1])
        return float((means * difference**2).sum())

    assert error(means) < 0.97 * error(np.ones_like(means))
