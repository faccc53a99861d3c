"""LLaVA and what is built as it is: a vision tower, a projector, and any text model."""

from ptq_cli.models.family import Multimodal

MULTIMODAL = Multimodal(
    model_types=(
        "llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "gemma3",
        "mistral3", "paligemma", "internvl", "aya_vision", "got_ocr2", "aria",
    ),
    towers=("vision_tower", "multi_modal_projector"),
    renames=(
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
)  # fmt: skip
