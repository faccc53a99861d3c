"""Tiny random models for the proof of every family's forward (test_forward_transformers.py): what
config.json may say of each family, a row each.

A row's name begins with the `model_type` it is about. Windows, chunks, original contexts, scaled
ropes, caps and multipliers are such that they matter within 64 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.interop.tiny_models import (
    _DELTA,
    _LATENT,
    _STREAMS,
    ENDS,
    EXPERTS,
    HEADS,
    VISION,
    _causal,
    _with_images,
)  # fmt: skip

Make = Callable[[], Any]


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def longrope(channels: int) -> dict[str, Any]:
    """Factors for so many pairs of channels."""
    short = [1.0 + 0.1 * i for i in range(channels)]
    return rope(
        "longrope", short_factor=short, long_factor=[1.0 + 0.7 * i for i in range(channels)]
    )


# What SIZES says and these families' config.json does not.
NO_KEY_HEADS = {"num_key_value_heads": None}
OLD = {**NO_KEY_HEADS, "intermediate_size": None}
THREE, FOUR = {"num_hidden_layers": 3}, {"num_hidden_layers": 4}
LINEAR = rope("linear", factor=4.0)
DYNAMIC = {"max_position_embeddings": 32, **rope("dynamic", factor=3.0)}
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_MSCALE = rope(
    "yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.8, mscale_all_dim=0.5,
    beta_fast=16, beta_slow=2, truncate=False,
)  # fmt: skip
HALF_TURNED = rope("default", partial_rotary_factor=0.5)
LOCAL_GLOBAL = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
}
LATE_WINDOWS = {
    **THREE, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
}  # fmt: skip
GEMMA = {**THREE, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9}
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}  # fmt: skip
SHARED_EXPERT = {**EXPERTS, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48}
QWEN3_EXPERTS = {
    **THREE, "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
}  # fmt: skip
LATENT_EXPERTS = {
    **THREE, **_LATENT, "num_key_value_heads": 4, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
NO_QUERY_RANK = {**LATENT_EXPERTS, "q_lora_rank": None}
LLAMA4 = {
    **FOUR, **HEADS, "intermediate_size_mlp": 96, "num_local_experts": 4,
    "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 16,
    "floor_scale": 8,
}  # fmt: skip
GPT_OSS = {
    **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9,
    "swiglu_limit": 1.0,
}  # fmt: skip
DELTA = {**FOUR, **HEADS, **_DELTA, **SHARED_EXPERT}
BAMBA = {
    **THREE, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16,
    "mamba_d_state": 16, "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
FALCON_RW = {**OLD, "multi_query": False, "parallel_attn": False, "bias": True}
PHI3 = {"original_max_position_embeddings": 128, "pad_token_id": 0}
OPT = {**THREE, **OLD, "ffn_dim": 112, "word_embed_proj_dim": 64}
LLAMA4_VISION = {
    "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 64, "num_heads": 4, "patch_size": 14,
}  # fmt: skip
QWEN_MARKS = {
    "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}  # fmt: skip
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
CLIP = {**VISION, "num_hidden_layers": 1, "model_type": "clip_vision_model", "projection_dim": 64}
PIXTRAL = {**VISION, "num_hidden_layers": 1, "model_type": "pixtral"}
SIGLIP = {
    **VISION, "num_hidden_layers": 1, "intermediate_size": 112, "model_type": "siglip_vision_model",
}  # fmt: skip
GEMMA_MARKS = {
    "mm_tokens_per_image": 4, "image_token_index": 250, "boi_token_index": 251,
    "eoi_token_index": 252,
}  # fmt: skip

DENSE: dict[str, Make] = {
    "bloom": _causal("Bloom", **OLD, **THREE),
    "bloom six heads": _causal("Bloom", **OLD, hidden_size=96, num_attention_heads=6),
    "bloom residual behind the norm": _causal(
        "Bloom", **OLD, apply_residual_connection_post_layernorm=True
    ),
    "cohere": _causal("Cohere", **THREE, **ENDS),
    "cohere qk norm, biases": _causal("Cohere", use_qk_norm=True, attention_bias=True, **ENDS),
    "cohere2": _causal("Cohere2", **FOUR, sliding_window=11, logit_scale=0.5, **ENDS),
    "falcon": _causal("Falcon", **OLD, **THREE),
    "falcon biases, relu": _causal("Falcon", **OLD, bias=True, activation="relu"),
    "falcon many key heads": _causal("Falcon", **OLD, multi_query=False),
    "falcon new decoder": _causal("Falcon", **OLD, new_decoder_architecture=True, num_kv_heads=2),
    "falcon new decoder, one norm": _causal(
        "Falcon", **OLD, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon in sequence": _causal("Falcon", **FALCON_RW),
    "falcon rw": _causal("Falcon", **FALCON_RW, alibi=True),
    # slopes that bfloat16 does not hold, in which transformers has them
    "falcon rw, 16 heads": _causal("Falcon", **FALCON_RW, alibi=True, num_attention_heads=16),
    "gemma": _causal("Gemma", **THREE, head_dim=32),
    "gemma2": _causal(
        "Gemma2", **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3_text": _causal("Gemma3", **{**GEMMA, "num_hidden_layers": 7, **LOCAL_GLOBAL}),
    "gemma3_text types, cap": _causal(
        "Gemma3", **GEMMA, final_logit_softcapping=2.0,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3n_text": _causal("Gemma3n", **FOUR, **HEADS, **_STREAMS, sliding_window=9),
    "gemma3n_text sparse": _causal(
        "Gemma3n", **FOUR, **HEADS, sliding_window=9,
        **{**_STREAMS, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0]},
    ),
    "glm4": _causal("Glm4", **THREE, **HEADS, **ENDS),
    "glm4 no biases": _causal("Glm4", **HEADS, **ENDS, attention_bias=False),
    "gpt2": _causal("GPT2", **OLD, **THREE),
    "gpt2 scale, gelu": _causal(
        "GPT2", **OLD, **THREE, scale_attn_by_inverse_layer_idx=True, activation_function="gelu",
        n_inner=96, tie_word_embeddings=False,
    ),
    "gpt_neox": _causal("GPTNeoX", **NO_KEY_HEADS, **THREE),
    "gpt_neox in sequence": _causal(
        "GPTNeoX", **NO_KEY_HEADS, use_parallel_residual=False, hidden_act="gelu_new",
        attention_bias=False,
    ),
    "gpt_neox fully turned": _causal(
        "GPTNeoX", **NO_KEY_HEADS, **rope("linear", factor=4.0, partial_rotary_factor=1.0)
    ),
    "granite": _causal("Granite", **THREE, **MULTIPLIERS),
    "granite tied, biases": _causal(
        "Granite", **MULTIPLIERS, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama": _causal("Llama", **THREE),
    "llama tied, biases": _causal(
        "Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama head_dim": _causal("Llama", head_dim=24, num_key_value_heads=1),
    "llama linear": _causal("Llama", **LINEAR),
    "llama dynamic": _causal("Llama", **DYNAMIC),
    "llama llama3": _causal("Llama", **LLAMA3),
    "llama yarn": _causal("Llama", **YARN),
    "llama yarn mscale": _causal("Llama", **YARN_MSCALE),
    "mistral": _causal("Mistral", **THREE, head_dim=32, sliding_window=None),
    "mistral window": _causal("Mistral", **THREE, sliding_window=11),
    "olmo2": _causal("Olmo2", **THREE),
    "olmo3": _causal("Olmo3", **FOUR, sliding_window=11),
    "olmo3 yarn": _causal("Olmo3", **FOUR, sliding_window=11, rope_scaling=YARN["rope_parameters"]),
    "opt": _causal("OPT", **OPT),
    "opt 350m": _causal("OPT", **{**OPT, "word_embed_proj_dim": 48}, do_layer_norm_before=False),
    "opt plain norms": _causal(
        "OPT", **OPT, layer_norm_elementwise_affine=False, enable_bias=False
    ),
    "phi3 window": _causal("Phi3", **THREE, **PHI3, sliding_window=13),
    "phi3 partial": _causal("Phi3", **PHI3, **HALF_TURNED),
    "phi3 longrope short": _causal(
        "Phi3", original_max_position_embeddings=64, **longrope(8), pad_token_id=0
    ),
    "phi3 longrope long": _causal(
        "Phi3", original_max_position_embeddings=32, **longrope(8), pad_token_id=0
    ),
    "phi3 phi-4-mini": _causal(
        "Phi3", **THREE, original_max_position_embeddings=64, rope_scaling={
            **longrope(6)["rope_parameters"], "partial_rotary_factor": 0.75,
        }, tie_word_embeddings=True, pad_token_id=0,
    ),
    "qwen2": _causal("Qwen2", **THREE),
    "qwen2 window": _causal("Qwen2", **LATE_WINDOWS),
    "qwen2 yarn": _causal("Qwen2", **YARN),
    "qwen3": _causal("Qwen3", **THREE, head_dim=32),
    "qwen3 window, biases": _causal(
        "Qwen3", **{**LATE_WINDOWS, "max_window_layers": 2}, head_dim=32, attention_bias=True
    ),
    "smollm3": _causal("SmolLM3", **FOUR, no_rope_layers=[1, 0, 1, 1], **ENDS),
    "smollm3 window": _causal(
        "SmolLM3", **FOUR, use_sliding_window=True, sliding_window=11, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=False, **ENDS,
    ),
    "starcoder2": _causal("Starcoder2", **THREE),
    "starcoder2 window": _causal("Starcoder2", sliding_window=11),
    "starcoder2 no biases": _causal("Starcoder2", use_bias=False, tie_word_embeddings=False),
}  # fmt: skip

MIXTURES: dict[str, Make] = {
    "bamba": _causal("Bamba", **BAMBA),
    "bamba biases, groups, limits": _causal(
        "Bamba", **BAMBA, mamba_n_groups=2, attention_bias=True, mlp_bias=True,
        time_step_limit=[0.5, 0.9],
    ),
    "bamba projection bias": _causal("Bamba", **BAMBA, mamba_proj_bias=True),
    "deepseek_v2": _causal("DeepseekV2", **LATENT_EXPERTS, topk_method="group_limited_greedy"),
    "deepseek_v2 lite": _causal("DeepseekV2", **NO_QUERY_RANK, **YARN_MSCALE),
    "deepseek_v2 biases": _causal("DeepseekV2", **LATENT_EXPERTS, attention_bias=True),
    "deepseek_v3": _causal("DeepseekV3", **LATENT_EXPERTS, **YARN_MSCALE),
    "deepseek_v3 lite": _causal(
        "DeepseekV3", **NO_QUERY_RANK, norm_topk_prob=False, rope_interleave=False
    ),
    "deepseek_v3 biases": _causal("DeepseekV3", **LATENT_EXPERTS, attention_bias=True),
    "glm4_moe_lite": _causal(
        "Glm4MoeLite", **{**LATENT_EXPERTS, "first_k_dense_replace": None},
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "gpt_oss": _causal("GptOss", **GPT_OSS, **FOUR, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0,
        truncate=False,
    )),
    "gpt_oss types, no biases": _causal(
        "GptOss", **GPT_OSS, layer_types=["full_attention", "sliding_attention"],
        attention_bias=False, **rope("default"),
    ),
    "granitemoe": _causal(
        "GraniteMoe", **THREE, **MULTIPLIERS, num_local_experts=4, num_experts_per_tok=2
    ),
    "llama4_text": _causal("Llama4", **LLAMA4),
    "llama4_text llama3": _causal(
        "Llama4", **{**LLAMA4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1}, **LLAMA3,
        use_qk_norm=False, attn_temperature_tuning=False, attention_bias=True,
    ),
    "mixtral": _causal("Mixtral", **THREE, num_local_experts=5, sliding_window=11),
    "qwen2_moe": _causal("Qwen2Moe", **THREE, **SHARED_EXPERT),
    "qwen2_moe some dense": _causal(
        "Qwen2Moe", **{**LATE_WINDOWS, **SHARED_EXPERT}, decoder_sparse_step=2,
        norm_topk_prob=True,
    ),
    "qwen3_moe": _causal("Qwen3Moe", **QWEN3_EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen3_moe window": _causal(
        "Qwen3Moe", **{**QWEN3_EXPERTS, "num_experts_per_tok": 2}, decoder_sparse_step=2,
        use_sliding_window=True, sliding_window=7,
    ),
    "qwen3_next": _causal("Qwen3Next", **DELTA),
    "qwen3_next some dense": _causal(
        "Qwen3Next", **DELTA, mlp_only_layers=[0, 3], norm_topk_prob=False, attention_bias=True,
        **rope("linear", factor=4.0, partial_rotary_factor=0.5),
    ),
}  # fmt: skip

WITH_IMAGES: dict[str, Make] = {
    # transformers leaves out the scale of the logits that the text model has alone
    "aya_vision": _with_images(
        "AyaVision", {"model_type": "cohere2", "sliding_window": 11, "logit_scale": 1.0, **ENDS},
        SIGLIP, image_token_index=250,
    ),
    "gemma3": _with_images(
        "Gemma3", {**GEMMA, "num_hidden_layers": 7, **LOCAL_GLOBAL}, SIGLIP, **GEMMA_MARKS
    ),
    "got_ocr2": _with_images(
        "GotOcr2", {"model_type": "qwen2"},
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64,
         "mlp_dim": 64, "output_channels": 32, "global_attn_indexes": [0]},
        image_token_index=250,
    ),
    "internvl": _with_images(
        "InternVL", {"model_type": "qwen2"},
        {**SIGLIP, "model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=250,
    ),
    "llama4": _with_images(
        "Llama4", LLAMA4, {**LLAMA4_VISION, **VISION, "intermediate_size": 256},
        image_token_index=250, boi_token_index=251, eoi_token_index=252,
    ),
    "llava": _with_images("Llava", {"model_type": "llama"}, CLIP, image_token_index=250),
    "llava qwen2": _with_images(
        "Llava", {"model_type": "qwen2", **LATE_WINDOWS}, CLIP, image_token_index=250
    ),
    "llava_next": _with_images(
        "LlavaNext", {"model_type": "mistral", "sliding_window": 11}, CLIP, image_token_index=250
    ),
    "llava_next_video": _with_images(
        "LlavaNextVideo", {"model_type": "llama"}, CLIP, image_token_index=250,
        video_token_index=251,
    ),
    "llava_onevision": _with_images(
        "LlavaOnevision", {"model_type": "qwen2"}, SIGLIP, image_token_index=250,
        video_token_index=251,
    ),
    "mistral3": _with_images(
        "Mistral3", {"model_type": "mistral", "head_dim": 32, "sliding_window": 11}, PIXTRAL,
        image_token_index=250,
    ),
    "qwen2_vl": _with_images(
        "Qwen2VL", MROPE, {**QWEN_VISION, "embed_dim": 64}, **QWEN_MARKS
    ),
    "qwen2_5_vl": _with_images(
        "Qwen2_5_VL", MROPE,
        {**QWEN_VISION, "intermediate_size": 108, "out_hidden_size": 64, "window_size": 112,
         "fullatt_block_indexes": [0]},
        **QWEN_MARKS,
    ),
    "qwen3_vl": _with_images(
        "Qwen3VL",
        {**HEADS, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True,
            "mrope_section": [2, 3, 3],
        }},
        {**QWEN_VISION, "intermediate_size": 108, "out_hidden_size": 64,
         "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **QWEN_MARKS,
    ),
    "qwen2_5_vl window": _with_images(
        "Qwen2_5_VL", {**MROPE, **LATE_WINDOWS},
        {**QWEN_VISION, "intermediate_size": 108, "out_hidden_size": 64, "window_size": 112,
         "fullatt_block_indexes": [0]},
        **QWEN_MARKS,
    ),
    "vipllava": _with_images(
        "VipLlava", {"model_type": "llama"}, CLIP, image_token_index=250,
        vision_feature_layers=[-1],
    ),
}  # fmt: skip

# What else config.json may say of a row's model, None: null. Some of it transformers leaves unread.
NO_ROPE = {"rope_parameters": None}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("bamba", {**NO_ROPE, "partial_rotary_factor": 1.0}),
    ("bamba", {"hidden_act": "gelu_fast"}),
    ("bloom", {"hidden_act": "relu"}),
    ("cohere", {**NO_ROPE, "partial_rotary_factor": 0.5}),
    ("cohere2", {"layer_types": None, "_sliding_window_pattern": 2}),
    ("deepseek_v2", {"rope_interleave": False}),
    ("deepseek_v2", {"norm_topk_prob": True}),
    ("falcon", {"hidden_act": "relu"}),
    ("gemma", {"hidden_activation": "relu"}),
    ("gemma", {"hidden_act": "relu"}),
    ("gemma2", {"layer_types": None, "sliding_window_pattern": 3}),
    ("gemma2", {"hidden_act": "relu"}),
    ("gemma3_text", {"rope_parameters": {**YARN["rope_parameters"], "rope_theta": 500.0}}),
    ("gemma3_text", {**NO_ROPE, "original_max_position_embeddings": 32, "rope_scaling": {
        "rope_type": "yarn", "factor": 3.0}}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("gemma3_text", {**NO_ROPE, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("glm4", {**NO_ROPE, "partial_rotary_factor": 1.0}),
    ("gpt2", {"activation_function": "gelu_accurate"}),
    ("gpt_neox", {**NO_ROPE, "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    ("gpt_neox", {"hidden_act": "gelu_fast"}),
    ("gpt_oss", {"norm_topk_prob": False}),
    ("granite", {"residual_multiplier": 0.0}),
    ("granitemoe", {"norm_topk_prob": False}),
    ("llama", {"hidden_act": "gelu_python"}),
    ("llama", {"hidden_act": "gelu_python_tanh"}),
    ("mixtral", {"norm_topk_prob": False}),
    ("olmo3", {"rope_parameters": {**YARN["rope_parameters"], "rope_theta": 500.0}}),
    ("olmo3", {**NO_ROPE, "rope_theta": 500.0}),
    ("olmo3 yarn", {"rope_parameters": {
        "full_attention": {**YARN["rope_parameters"], "rope_theta": 1e4, "truncate": False},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }}),
    ("phi3 longrope long", {"rope_parameters": {
        **longrope(8)["rope_parameters"], "rope_type": "yarn"}}),
    ("phi3 phi-4-mini", {"rope_scaling": {
        "type": "yarn", "short_factor": [1.5] * 6, "long_factor": [2.5] * 6,
        "partial_rotary_factor": 0.75}}),
    ("qwen3_next", {"hidden_act": "gelu"}),
    ("gpt_oss", NO_ROPE),
    ("glm4", {**NO_ROPE, "partial_rotary_factor": None}),
    ("llama yarn", {"rope_parameters": {
        **YARN["rope_parameters"], "truncate": None, "beta_fast": None}}),
    ("qwen2 yarn", {"rope_scaling": {**YARN["rope_parameters"], "truncate": None}}),
]  # fmt: skip

ROWS: dict[str, Make] = {**DENSE, **MIXTURES, **WITH_IMAGES}

# Padding has outputs of the projection's bias there, which the convolution spreads.
ALONE = {"bamba projection bias"}

# The rows of these do not run yet: a family that gets a forward leaves.
WITHOUT_A_FORWARD = {"gemma3n_text"}
