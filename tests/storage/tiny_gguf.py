"""Tiny models of every family that has a forward and a place in GGUF, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptq_cli.models.forward.architecture import read_architecture

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 48, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {"head_dim": 16}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "attention_factor": 1.3,
}  # fmt: skip
LONG = {
    "type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.2 * i for i in range(6)],
}  # fmt: skip
GEMMA: dict[str, Any] = {
    **SIZES, **HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {**SIZES, "sliding_window": None},
    "mixtral": {**SIZES, **EXPERTS},
    "qwen2": {**SIZES, "rope_scaling": YARN},
    "qwen3": {**SIZES, **HEADS, "tie_word_embeddings": True},
    "qwen2_moe": {
        **SIZES, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96, "norm_topk_prob": False,
    },
    "qwen3_moe": {
        **SIZES, **EXPERTS, "head_dim": 32, "norm_topk_prob": True, "moe_intermediate_size": 64,
        "rope_scaling": {**YARN, "attention_factor": None},
    },
    "gemma2": {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3": {
        **GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {
        **SIZES, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 32,
        "rope_scaling": LONG,
    },
    "gemma": {**SIZES, **HEADS, "tie_word_embeddings": True},
    "smollm3": {**SIZES, "num_hidden_layers": 4, "attention_bias": False},
    "granite": {
        **SIZES, "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1, "residual_multiplier": 0.4, "logits_scaling": 2.0,
    },
    "olmo2": {**SIZES, "rope_scaling": YARN},
    "olmo3": {**SIZES, "num_hidden_layers": 4, "sliding_window": 8, "rope_scaling": YARN},
    "glm4": {**SIZES, **HEADS, "attention_bias": True},
    "cohere2": {
        **SIZES, "num_hidden_layers": 4, "layer_norm_eps": 1e-5, "sliding_window": 8,
        "logit_scale": 0.5, "tie_word_embeddings": True,
    },
    "starcoder2": {**SIZES, "norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 48},
}  # fmt: skip


def config_of(kind: str) -> dict[str, Any]:
    return {"model_type": kind, **MODELS[kind]}


def mlps_of(block: Any) -> list[Any]:
    if not block.experts:
        return [block.feed_forward]
    return [*block.experts.experts, *filter(None, [block.experts.shared])]


def random_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of values that float16 holds."""
    arch, rng, found = read_architecture(config), np.random.default_rng(5), {}
    width = arch.hidden_size

    def linear(module: Any, rows: int, columns: int) -> None:
        weight = rng.standard_normal((rows, columns)) / columns**0.5
        found[f"{module.name}.weight"] = weight.T if module.transposed else weight
        if module.bias:
            found[f"{module.name}.bias"] = rng.standard_normal(rows) / 10

    def norm(own: Any, size: int) -> None:
        gain = 1 + rng.standard_normal(size) / 10
        gain[:2] *= 6
        found[f"{own.name}.weight"] = gain - own.offset
        if own.bias:
            found[f"{own.name}.bias"] = rng.standard_normal(size) / 10

    for name in {arch.embedding, arch.head}:
        found[name] = rng.standard_normal((arch.vocab_size, width)) / 8
    if arch.positions:
        found[arch.positions] = rng.standard_normal((64, width)) / 8
    norm(arch.final_norm, width)
    for block in arch.blocks:
        attention = block.attention
        queries, keys = (n * attention.head_dim for n in (attention.n_heads, attention.n_kv_heads))
        sizes = [queries, keys, keys] if len(attention.qkv) == 3 else [queries + 2 * keys]
        for module, rows in zip(attention.qkv, sizes, strict=True):
            linear(module, rows, width)
        linear(attention.output, width, queries)
        whole = (attention.n_heads, attention.n_kv_heads) if attention.norm_whole else (1, 1)
        for own, heads in zip(attention.norms.values(), whole, strict=False):
            norm(own, heads * attention.head_dim)
        for own in block.norms.values():
            norm(own, width)
        if block.experts:
            linear(block.experts.router, len(block.experts.experts), width)
        if block.experts and block.experts.shared_gate:
            linear(block.experts.shared_gate, 1, width)
        for mlp in mlps_of(block):
            for module in mlp.inputs:
                rows = mlp.width * (2 if mlp.gated and len(mlp.inputs) == 1 else 1)
                linear(module, rows, width)
            linear(mlp.output, width, mlp.width)
    return {name: np.ascontiguousarray(x.astype(np.float16)) for name, x in found.items()}
