"""A model of a family with a forward: random tensors of the shapes that config.json makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ptq_cli.models.forward.architecture import Architecture, read_architecture

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 100.0,
    "max_position_embeddings": 64, "dtype": "float32", "num_experts_per_tok": 2,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16,
        "n_shared_experts": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 5},
    "llama4_text": {
        "num_local_experts": 4, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 5, "no_rope_layers": [1, 0], "floor_scale": 4,
    },
    "qwen2_moe": {**_EXPERTS, "num_experts": 4},
}  # fmt: skip


def tiny_model(folder: Path, kind: str, **config: Any) -> Path:
    full = {**SIZES, "model_type": kind, **CONFIGS[kind], **config}
    random = np.random.default_rng(7)
    tensors = {
        name: (random.standard_normal(shape) / 4 + name.endswith("norm.weight")).astype(np.float32)
        for name, shape in _shapes(read_architecture(full))
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(full))
    save_file(tensors, folder / "model.safetensors")
    np.save(folder / "tokens.npy", random.integers(0, 40, (16, 12)))
    return folder


def _shapes(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = arch.hidden_size
    yield from ((name, (arch.vocab_size, width)) for name in (arch.embedding, arch.head))
    assert arch.final_norm is not None
    for norm in (arch.final_norm, *(norm for b in arch.blocks for norm in b.norms.values())):
        yield f"{norm.name}.weight", (width,)
    for block in arch.blocks:
        for branch in (block.mixer, block.feed_forward):
            made = branch.shapes(width)
            yield from ((name, (length,)) for name, length in made.vectors.items())
            for linear, shape in made.of.items():
                yield f"{linear}.weight", shape
                yield f"{linear}.bias", shape[:1]
