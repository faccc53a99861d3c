"""A Llama of a few KiB as a GGUF file, written with the gguf library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEAD, HEADS, INNER, VOCAB = 512, 4, 2, 32, 4
KEYS: dict[str, Any] = {
    "embedding_length": WIDTH, "block_count": 1, "feed_forward_length": INNER,
    "context_length": 64, "attention.head_count": HEADS, "attention.head_count_kv": 1,
    "attention.key_length": HEAD, "attention.value_length": HEAD,
    "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
SHAPES = {
    "token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,),
    "blk.0.ffn_norm": (WIDTH,), "blk.0.attn_q": (HEADS * HEAD, WIDTH),
    "blk.0.attn_k": (HEAD, WIDTH), "blk.0.attn_v": (HEAD, WIDTH),
    "blk.0.attn_output": (WIDTH, HEADS * HEAD), "blk.0.ffn_gate": (INNER, WIDTH),
    "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER),
}  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    """float32, of values that bfloat16 and float16 hold."""
    return {
        f"{name}.weight": (np.arange(np.prod(shape)) % 251).astype(np.float32).reshape(shape) / 64
        for name, shape in SHAPES.items()
    }


def write_gguf_file(
    path: Path,
    arrays: dict[str, np.ndarray],
    packed: dict[str, tuple[str, np.ndarray]] | None = None,
    architecture: str = "llama",
    **keys: Any,
) -> Path:
    """arrays: by GGUF's names; packed: ggml's type and uint8 [rows, bytes of a row] of others;
    keys: behind the architecture's name, None for one that is left out"""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in {**KEYS, **keys}.items():
        if value is not None:
            kinds[type(value)](f"{architecture}.{key}", value)
    for name, array in arrays.items():
        if name not in (packed or {}):
            writer.add_tensor(name, array)
    for name, (kind, data) in (packed or {}).items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EXPERTS = 3


def write_unknown_gguf(
    path: Path, dtype: Any = np.float32, alignment: int | None = None
) -> dict[str, np.ndarray]:
    """A file of an architecture that nobody knows, with experts, key-values of every kind and
    tensors of many; its arrays by name."""
    import gguf

    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "phi9")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"phi9.{kind}", 7)
    writer.add_float32("phi9.float32", 0.1)
    writer.add_float64("phi9.float64", 0.1)
    writer.add_bool("phi9.bool", True)
    writer.add_array("phi9.floats", [0.5, 0.1])
    writer.add_array("phi9.flags", [True, False])
    writer.add_key_value("phi9.bytes", b"\x00\xff\x07", gguf.GGUFValueType.ARRAY)
    writer.add_token_list(["a", "\u2581b", "<0x0A>"])
    writer.add_chat_template("{{ messages }}")
    writer.add_file_type(0)
    matrices = {
        "token_embd.weight": (16, 64), "blk.0.attn_qkv.weight": (48, 64),
        "blk.0.ssm_conv1d.weight": (64, 32), "blk.0.ffn_gate_inp.weight": (EXPERTS, 64),
        "blk.0.ffn_up_exps.weight": (EXPERTS, 32, 64), "blk.0.attn_k_b.weight": (2, 8, 64),
        "blk.0.ffn_down_exps.weight": (EXPERTS, 64, 32), "output.weight": (16, 64),
    }  # fmt: skip
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in matrices.items()}
    arrays["blk.0.attn_norm.weight"] = np.ones(64, np.float32)
    arrays["blk.0.attn_qkv.bias"] = rng.standard_normal(48).astype(np.float32)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays
