"""Qwen3-VL: a Qwen3 beside a vision tower. Of text, a token's time, row and column are one, so its
rotary embeddings are a Qwen3's."""

from dataclasses import replace

from ptq_cli.models.families import qwen3
from ptq_cli.models.family import Folds, Multimodal
from ptq_cli.models.forward.reader import Forward

FAMILY = replace(
    qwen3.FAMILY,
    name="qwen3_vl",
    other_types=("qwen3_vl_text",),
    defaults={
        **qwen3.FAMILY.defaults,
        "rope_theta": 500000.0, "max_position_embeddings": 128000,
    },
    folds=Folds(),
    forward=Forward(biases=qwen3.BIASES),
    gguf=None,
)  # fmt: skip

MULTIMODAL = Multimodal(model_types={"qwen3_vl": "qwen3_vl_text"}, towers=("visual",))
