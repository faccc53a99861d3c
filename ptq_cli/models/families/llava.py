"""LLaVA and what is built as it is: a vision tower, a projector, and any text model."""

from dataclasses import replace

from ptq_cli.models.family import Multimodal

MULTIMODAL = Multimodal(
    model_types={
        "llava": "llama", "llava_next": "llama", "llava_next_video": "llama",
        "llava_onevision": "qwen2", "vipllava": "llama", "gemma3": "gemma3_text",
        "mistral3": "mistral", "internvl": "qwen2", "aya_vision": "cohere2", "got_ocr2": "qwen2",
        "aria": "aria_text",
    },
    towers=("vision_tower", "multi_modal_projector"),
    text_ties=("llava", "llava_next_video", "llava_onevision"),
    renames=(
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
)  # fmt: skip
# the tokens of a prompt see one another in both directions, without an image too
PALIGEMMA = replace(MULTIMODAL, model_types={"paligemma": "gemma"}, causal=False)
