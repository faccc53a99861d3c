"""Tiny random models of many architectures, saved by transformers: `python -m
tests.interop.tiny_models FOLDER [NAME...]`.

Each is a model folder in bfloat16, as `save_pretrained` writes it: names and layouts are those of
published checkpoints. Widths are multiples of 32, but for the vision towers'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
HEADS = {"head_dim": 16}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip


def _causal(family: str, **settings: Any) -> Callable[[], Any]:
    """A language model of transformers, from its config for text."""

    def make() -> Any:
        import transformers

        kinds = (f"{family}TextConfig", f"{family}Config")
        kind = next(getattr(transformers, name) for name in kinds if hasattr(transformers, name))
        config = kind(**{**SIZES, **settings})
        return transformers.AutoModelForCausalLM.from_config(config)

    return make


def _with_images(
    family: str, text: dict[str, Any], vision: dict[str, Any], **settings: Any
) -> Callable[[], Any]:
    """`<family>ForConditionalGeneration`: a text model beside a vision tower."""

    def make() -> Any:
        import transformers

        kind = getattr(transformers, f"{family}Config")
        config = kind(text_config={**SIZES, **text}, vision_config=vision, **settings)
        return getattr(transformers, f"{family}ForConditionalGeneration")(config)

    return make


_GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_LONG = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.2 * i for i in range(6)],
}
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
_STREAMS = {
    "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
    "num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.0] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

MODELS: dict[str, Callable[[], Any]] = {
    "bamba": _causal(
        "Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16,
        mamba_expand=2,
    ),
    "bloom": _causal("Bloom", n_layer=2, n_head=4),
    "cohere": _causal("Cohere", use_qk_norm=True, **ENDS),
    "deepseek_v3": _causal(
        "DeepseekV3", num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, **_LATENT,
    ),
    "falcon": _causal("Falcon", multi_query=True, parallel_attn=True, bias=False),
    "gemma2": _causal("Gemma2", **HEADS, query_pre_attn_scalar=16, sliding_window=16),
    "gemma3": _with_images(
        "Gemma3",
        {**HEADS, "num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 16},
        {**VISION, "intermediate_size": 112},
        mm_tokens_per_image=4, image_token_index=250, boi_token_index=251, eoi_token_index=252,
    ),
    "gemma3n_text": _causal("Gemma3n", num_hidden_layers=4, **HEADS, **_STREAMS),
    "glm4": _causal("Glm4", **HEADS, **ENDS),
    "gpt2": _causal("GPT2", **_GPT2),
    "gpt_neox": _causal("GPTNeoX"),
    "gpt_oss": _causal(
        "GptOss", **HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "granite": _causal(
        "Granite", embedding_multiplier=12.0, attention_multiplier=1 / 64,
        residual_multiplier=0.22, logits_scaling=8.0,
    ),
    "llama": _causal("Llama"),
    "llama4_text": _causal(
        "Llama4", **HEADS, intermediate_size_mlp=128, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=64,
    ),
    "llava": _with_images(
        "Llava",
        {"model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=250,
    ),
    "mistral": _causal("Mistral", head_dim=32, sliding_window=16),
    "mistral3": _with_images(
        "Mistral3",
        {**HEADS, "model_type": "mistral"},
        {**VISION, "model_type": "pixtral"},
        image_token_index=250,
    ),
    "mixtral": _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "mixtral_stacked": _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmo2": _causal("Olmo2"),
    "opt": _causal("OPT", ffn_dim=128, word_embed_proj_dim=64),
    "phi3": _causal(
        "Phi3", partial_rotary_factor=0.75, tie_word_embeddings=True, pad_token_id=0,
        original_max_position_embeddings=64, rope_scaling=_LONG,
    ),
    "qwen2": _causal("Qwen2"),
    "qwen2_5_vl": _with_images(
        "Qwen2_5_VL",
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        {
            "depth": 2, "hidden_size": 64, "intermediate_size": 108, "num_heads": 4,
            "out_hidden_size": 64, "patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=250, video_token_id=251, vision_start_token_id=252,
        vision_end_token_id=253,
    ),
    "qwen2_moe": _causal(
        "Qwen2Moe", **EXPERTS, moe_intermediate_size=64, shared_expert_intermediate_size=64
    ),
    "qwen3": _causal("Qwen3", **HEADS),
    "qwen3_moe": _causal(
        "Qwen3Moe", **HEADS, **EXPERTS, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "qwen3_moe_stacked": _causal(
        "Qwen3Moe", **HEADS, **EXPERTS, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "qwen3_next": _causal(
        "Qwen3Next", num_hidden_layers=4, **HEADS, **EXPERTS, **_DELTA, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "smollm3": _causal(
        "SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], **ENDS
    ),
    "starcoder2": _causal("Starcoder2"),
    "tied_llama": _causal("Llama", tie_word_embeddings=True),
}  # fmt: skip

# Saved with all experts of a block in one tensor.
AS_IN_MEMORY = ("mixtral_stacked", "qwen3_moe_stacked")


def _fill(model: Any) -> None:
    """Random weights that keep the size of what passes through them."""
    import torch

    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim >= 2:
                width = values.shape[-1]
                values.copy_(torch.randn(values.shape, generator=drawn) / width**0.5)
            elif "norm" in name or "ln" in name:
                values.copy_(0.75 + torch.rand(values.shape, generator=drawn) / 2)
            else:
                values.copy_(torch.randn(values.shape, generator=drawn) / 10)


def write_models(folder: Path, names: list[str]) -> None:
    import torch

    for name in names or MODELS:
        torch.manual_seed(0)
        model = MODELS[name]()
        _fill(model)
        model.to(torch.bfloat16).save_pretrained(
            folder / name, save_original_format=name not in AS_IN_MEMORY
        )


if __name__ == "__main__":
    write_models(Path(sys.argv[1]), sys.argv[2:])
