"""Model folders of a few KiB, with the names of published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.builders import random_weight, write_model

WIDTH, WIDE = 64, 128


def dense_block(path: str) -> dict[str, Any]:
    attention = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    mlp = {"mlp.gate_proj": (WIDE, WIDTH), "mlp.up_proj": (WIDE, WIDTH)}
    shapes = {**attention, **mlp, "mlp.down_proj": (WIDTH, WIDE)}
    shapes |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    return {f"{path}{name}.weight": random_weight(*shape) for name, shape in shapes.items()}


def mixture_block(path: str, experts: int = 2) -> dict[str, Any]:
    """Mixtral's."""
    shapes = {"w1": (WIDE, WIDTH), "w2": (WIDTH, WIDE), "w3": (WIDE, WIDTH)}
    found = {n: w for n, w in dense_block(path).items() if "mlp" not in n}
    for number in range(experts):
        own = f"{path}block_sparse_moe.experts.{number}."
        found |= {f"{own}{name}.weight": random_weight(*size) for name, size in shapes.items()}
    return {**found, f"{path}block_sparse_moe.gate.weight": random_weight(experts, WIDTH)}


def model_folder(path: Path, kind: str, tensors: dict[str, Any], **config: Any) -> Path:
    path.mkdir()
    own = {
        "model_type": kind, "dtype": "bfloat16", "hidden_size": WIDTH, "intermediate_size": WIDE,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, **config,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(own))
    write_model(path / "model.safetensors", tensors, {"format": "pt"})
    return path


def ends(prefix: str = "model.", head: str | None = "lm_head", seed: int = 1) -> dict[str, Any]:
    found = {
        f"{prefix}embed_tokens.weight": random_weight(96, WIDTH, seed=1),
        f"{prefix}norm.weight": random_weight(WIDTH),
    }
    return (
        found if head is None else {**found, f"{head}.weight": random_weight(96, WIDTH, seed=seed)}
    )


def llama(path: Path, kind: str = "llama", seed: int = 1, **config: Any) -> Path:
    """With a head of its own, which is the embedding's values unless `seed` is another."""
    blocks = {**dense_block("model.layers.0."), **dense_block("model.layers.1.")}
    return model_folder(path, kind, {**ends(seed=seed), **blocks}, **config)


def mixtral(path: Path) -> Path:
    blocks = {**mixture_block("model.layers.0."), **mixture_block("model.layers.1.")}
    return model_folder(path, "mixtral", {**ends(), **blocks}, num_local_experts=2)


def llava(path: Path) -> Path:
    """A Llama beside a tower of which one width fits no group."""
    text, tower = "language_model.model.", "vision_tower.encoder.layers."
    tensors = {**dense_block(f"{text}layers.0."), **dense_block(f"{text}layers.1.")}
    for number in range(2):
        own = f"{tower}{number}."
        tensors[f"{own}self_attn.q_proj.weight"] = random_weight(WIDTH, WIDTH)
        tensors[f"{own}mlp.fc1.weight"] = random_weight(108, WIDTH)
        tensors[f"{own}mlp.fc2.weight"] = random_weight(WIDTH, 108)
    tensors["multi_modal_projector.linear_1.weight"] = random_weight(WIDTH, WIDTH)
    tensors |= ends(text, "language_model.lm_head")
    return model_folder(path, "llava", tensors, text_config={"model_type": "llama"})
