"""Gemma 2: norms store gain − 1 and stand on both sides of a branch; scores and logits are capped;
every second block has a window.

post_attention_layernorm is *behind* the attention here and feeds no linear. Norms behind a branch
stay as they are: folding never changes what a site gives out.
"""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.models.families import gemma, llama, qwen3
from ptq_cli.models.family import Config, Family, Folds
from ptq_cli.models.forward.reader import Forward


def score_size(config: Config, biggest: int) -> int:
    """What llama.cpp takes the root of to divide scores by; the biggest model of a generation is
    told by its number of blocks."""
    if config["num_hidden_layers"] == biggest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


FORWARD = Forward(
    embedding_scaled=True,
    biases=qwen3.BIASES,
    slides=lambda config, index: (index + 1) % 2 != 0,
    by_type=True,
)

FAMILY = Family(
    name="gemma2",
    names=replace(
        llama.FAMILY.names,
        norms={
            "attention_in": "input_layernorm", "attention_out": "post_attention_layernorm",
            "mlp_in": "pre_feedforward_layernorm", "mlp_out": "post_feedforward_layernorm",
        },
    ),
    plus_one=True,
    defaults={
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "vocab_size": 256000, "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    },
    sizes={"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    keys={
        "activation": "hidden_activation", "score_size": "query_pre_attn_scalar",
        "attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping",
    },
    folds=Folds(),
    forward=FORWARD,
    gguf=replace(
        gemma.GGUF,
        architecture="gemma2",
        assumed=lambda settings: {"score_size": score_size(settings, 46)},
        factors={
            "attn_logit_softcapping": "attention_softcap",
            "final_logit_softcapping": "logit_softcap",
        },
        window_period=2,
        model_class="Gemma2ForCausalLM",
    ),
)  # fmt: skip
