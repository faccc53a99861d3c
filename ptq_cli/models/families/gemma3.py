"""Gemma 3 (text): Gemma 2 with norms on the heads of q and k instead of capped scores; five of six
blocks have a window, and a rotary base of their own."""

from dataclasses import replace

from ptq_cli.models.families import gemma, gemma2, qwen3
from ptq_cli.models.family import Config


def slides(config: Config, index: int, period: int) -> bool:
    """Whether a block has a window: every `period`-th is full, or every n-th by a key of older
    config.json."""
    return bool((index + 1) % (config.get("sliding_window_pattern") or period))


FAMILY = replace(
    gemma2.FAMILY,
    name="gemma3",
    other_types=("gemma3_text",),
    names=replace(
        gemma2.FAMILY.names,
        prefixes=("model.", "language_model.model.", "model.language_model."),
        norms={**qwen3.NORMS, **gemma2.FAMILY.names.norms},
    ),
    defaults={
        **gemma2.FAMILY.defaults,
        "rope_theta": 1e6, "vocab_size": 262208, "max_position_embeddings": 131072,
        "rope_local_base_freq": 10000.0, "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    keys={
        "activation": "hidden_activation", "score_size": "query_pre_attn_scalar",
        "logit_softcap": "final_logit_softcapping", "local_rope_theta": "rope_local_base_freq",
    },
    forward=replace(
        gemma2.FORWARD, slides=lambda config, index: slides(config, index, 6)
    ),
    gguf=replace(
        gemma.GGUF,
        architecture="gemma3",
        assumed=lambda settings: {
            "score_size": gemma2.score_size(settings, 62), "attention_softcap": None,
            "logit_softcap": None,
        },
        factors={"rope.freq_base_swa": "local_rope_theta"},
        window_period=6,
        model_class="Gemma3ForCausalLM",
    ),
)  # fmt: skip
