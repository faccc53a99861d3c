"""Qwen2-VL and Qwen2.5-VL: a Qwen2 beside a vision tower. Of text, a token's time, row and column
are one, so its rotary embeddings are a Qwen2's."""

from dataclasses import replace

from ptq_cli.models.families import qwen2
from ptq_cli.models.family import Folds, Multimodal

FAMILY = replace(
    qwen2.FAMILY,
    name="qwen2_vl",
    other_types=("qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
    defaults={
        **qwen2.FAMILY.defaults,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_window_layers": 80,
        "num_key_value_heads": 8,
    },
    sizes={
        "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568,
        "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    folds=Folds(),
    gguf=None,
)  # fmt: skip

MULTIMODAL = Multimodal(
    model_types={"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"},
    towers=("visual",),
    text_ties=("qwen2_vl", "qwen2_5_vl"),
    renames=(
        ("visual.", "model.visual."),
        ("model.visual.", "model.visual."),
        ("model.language_model.", "model.language_model."),
        ("model.", "model.language_model."),
    ),
)
