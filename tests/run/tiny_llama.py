"""A Llama of two blocks, four heads and two key heads, with tokens beside it: a run takes a tenth
of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "dtype": "float32",
    "rope_theta": 100.0,
}  # fmt: skip


def tiny_llama(folder: Path, inner: int = 48, **config: Any) -> Path:
    """inner: the width of its MLP, and so on with what config.json says"""
    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (40, 32),
        "lm_head.weight": (40, 32),
        "model.norm.weight": (32,),
    }
    for block in range(2):
        base = f"model.layers.{block}."
        shapes |= {
            f"{base}self_attn.{n}_proj.weight": (16 if n in "kv" else 32, 32) for n in "qkvo"
        }
        shapes |= {f"{base}{n}_layernorm.weight": (32,) for n in ("input", "post_attention")}
        shapes |= {f"{base}mlp.{n}_proj.weight": (inner, 32) for n in ("gate", "up")}
        shapes[f"{base}mlp.down_proj.weight"] = (32, inner)
    tensors = {
        name: (random.standard_normal(shape) / 4 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    for block in range(2):  # heads of different reach, on which scales can differ
        for name, reach in (("k", 3), ("v", 0.2)):
            tensors[f"model.layers.{block}.self_attn.{name}_proj.weight"][8:] *= reach
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "intermediate_size": inner, **config})
    )
    save_file(tensors, folder / "model.safetensors")
    np.save(folder / "tokens.npy", random.integers(0, 40, (16, 12)))
    return folder
