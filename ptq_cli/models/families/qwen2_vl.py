"""Qwen2-VL and Qwen2.5-VL: a Qwen2 beside a vision tower."""

from ptq_cli.models.families import qwen2
from ptq_cli.models.family import Family, Folds, Multimodal

FAMILY = Family(
    name="qwen2_vl",
    other_types=("qwen2_vl_text", "qwen2_5_vl_text"),
    names=qwen2.FAMILY.names,
    folds=Folds(),
)

MULTIMODAL = Multimodal(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    towers=("visual",),
    renames=(
        ("visual.", "model.visual."),
        ("model.visual.", "model.visual."),
        ("model.language_model.", "model.language_model."),
        ("model.", "model.language_model."),
    ),
)
