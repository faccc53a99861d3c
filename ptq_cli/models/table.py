"""The families whose forward is known, as data: names of modules, flags and config.json's defaults.

Module names are inside a block (`<prefix><blocks>.<index>.`) unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PRE_NORMS = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
HEAD_NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
GEMMA_NORMS = {
    "attention_in": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Family:
    """What tells one family from another.

    prefixes: of the model's tensors; the first under which the embedding is found counts
    blocks, embedding, final_norm: module names after the prefix
    head: the output's linear, from the root
    positions: learned positions after the prefix, if any; `position_offset` is added to them, and
        with `position_counts` they count tokens instead of columns
    qkv, output, mlp_in, mlp_out: linears; one name in qkv, or in a gated mlp_in, is a fused one
    gated: the MLP is `down(f(gate) · up)`, else `down(f(up))`
    norms: role -> name; attention_in and mlp_in before the branch, …_out after it, q and k on heads
    biases: "qkv", "output" and "mlp" -> always (true), never or a key of config.json
    transposed: linears are stored [in_features, out_features]
    activation: config.json's key
    window: "all" blocks slide where `sliding_window` is set, or some by "types"
    window_switch: key that must be true for windows to count
    local_theta: rotary base of sliding blocks, key and default, where it differs
    expert, router: "{}" is the expert's number; `expert_in` and `expert_out` are inside it
    defaults: config.json's, where a file leaves a key out
    aliases: this module's words -> the family's keys
    """

    prefixes: tuple[str, ...] = ("model.",)
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    embedding_scaled: bool = False
    final_norm: str = "norm"
    head: str = "lm_head"
    positions: str | None = None
    position_offset: int = 0
    position_counts: bool = False
    rotary: bool = True
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    gated: bool = True
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    centred: bool = False
    norm_offset: float = 0.0
    norm_eps: str = "rms_norm_eps"
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    transposed: bool = False
    activation: str = "hidden_act"
    attention_softcap: bool = False
    window: str | None = None
    window_switch: str | None = None
    local_theta: tuple[str, float] | None = None
    router: str | None = None
    expert: str = "mlp.experts.{}"
    expert_in: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_out: str = "down_proj"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "vocab_size": 256000,
}

_LLAMA = Family(
    biases={"qkv": "attention_bias", "output": "attention_bias", "mlp": "mlp_bias"},
    defaults={**_COMMON, "max_position_embeddings": 2048},
)
_MISTRAL = Family(
    window="all",
    defaults={**_COMMON, "max_position_embeddings": 131072, "sliding_window": 4096},
)
_QWEN2 = Family(
    biases={"qkv": True},
    window="types",
    window_switch="use_sliding_window",
    defaults={**_COMMON, **_QWEN_WINDOW, "max_position_embeddings": 32768},
)
_QWEN3 = Family(
    norms={**PRE_NORMS, **HEAD_NORMS},
    biases={"qkv": "attention_bias", "output": "attention_bias"},
    window="types",
    window_switch="use_sliding_window",
    defaults={**_COMMON, **_QWEN_WINDOW, "max_position_embeddings": 32768, "head_dim": 128},
)
_QWEN3_MOE = Family(
    norms={**PRE_NORMS, **HEAD_NORMS},
    biases={"qkv": "attention_bias", "output": "attention_bias"},
    window="all",
    window_switch="use_sliding_window",
    router="mlp.gate",
    defaults={
        **_COMMON, **_QWEN_WINDOW, "max_position_embeddings": 32768, "num_experts_per_tok": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": (), "norm_topk_prob": False,
    },
    aliases={"num_experts": "num_local_experts", "expert_size": "moe_intermediate_size"},
)  # fmt: skip
_MIXTRAL = Family(
    window="all",
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}",
    expert_in=("w1", "w3"),
    expert_out="w2",
    defaults={
        **_COMMON, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072,
        "num_experts_per_tok": 2, "num_local_experts": 8, "norm_topk_prob": True,
    },
    aliases={"num_experts": "num_local_experts", "expert_size": "intermediate_size"},
)  # fmt: skip
_GEMMA2 = Family(
    embedding_scaled=True,
    norms=GEMMA_NORMS,
    norm_offset=1.0,
    biases={"qkv": "attention_bias", "output": "attention_bias"},
    activation="hidden_activation",
    attention_softcap=True,
    window="types",
    defaults={
        **_GEMMA, "rope_theta": 10000.0, "max_position_embeddings": 8192,
        "sliding_window_pattern": 2, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
)  # fmt: skip
_GEMMA3 = Family(
    prefixes=("model.", "language_model.model.", "model.language_model."),
    embedding_scaled=True,
    norms={**GEMMA_NORMS, **HEAD_NORMS},
    norm_offset=1.0,
    biases={"qkv": "attention_bias", "output": "attention_bias"},
    activation="hidden_activation",
    window="types",
    local_theta=("rope_local_base_freq", 10000.0),
    defaults={
        **_GEMMA, "rope_theta": 1e6, "max_position_embeddings": 131072,
        "sliding_window_pattern": 6, "vocab_size": 262208,
    },
)  # fmt: skip
_PHI3 = Family(
    qkv=("self_attn.qkv_proj",),
    mlp_in=("mlp.gate_up_proj",),
    window="all",
    defaults={
        **_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None,
        "original_max_position_embeddings": 4096,
    },
)  # fmt: skip
_GPT2 = Family(
    prefixes=("transformer.", ""),
    blocks="h",
    embedding="wte",
    final_norm="ln_f",
    positions="wpe",
    rotary=False,
    qkv=("attn.c_attn",),
    output="attn.c_proj",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    gated=False,
    norms={"attention_in": "ln_1", "mlp_in": "ln_2"},
    centred=True,
    norm_eps="layer_norm_epsilon",
    biases={"qkv": True, "output": True, "mlp": True},
    transposed=True,
    activation="activation_function",
    defaults={
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "scale_attn_weights": True, "n_positions": 1024,
    },
    aliases={
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
    },
)  # fmt: skip
_OPT = Family(
    prefixes=("model.decoder.", "decoder."),
    final_norm="final_layer_norm",
    positions="embed_positions",
    position_offset=2,
    position_counts=True,
    rotary=False,
    output="self_attn.out_proj",
    mlp_in=("fc1",),
    mlp_out="fc2",
    gated=False,
    norms={"attention_in": "self_attn_layer_norm", "mlp_in": "final_layer_norm"},
    centred=True,
    norm_eps="layer_norm_eps",
    biases={"qkv": "enable_bias", "output": "enable_bias", "mlp": "enable_bias"},
    activation="activation_function",
    defaults={
        "activation_function": "relu", "layer_norm_eps": 1e-5, "tie_word_embeddings": True,
        "enable_bias": True, "layer_norm_elementwise_affine": True, "do_layer_norm_before": True,
        "max_position_embeddings": 2048,
    },
    aliases={"intermediate_size": "ffn_dim"},
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MIXTRAL,
    "opt": _OPT,
    "phi3": _PHI3,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
}
