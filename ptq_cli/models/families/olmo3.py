"""OLMo 3: OLMo 2 with a window in three of four blocks, whose rotary embeddings are plain."""

from dataclasses import replace

from ptq_cli.models.families import olmo2
from ptq_cli.models.gguf_family import GgufFamily

FAMILY = replace(
    olmo2.FAMILY,
    name="olmo3",
    defaults={**olmo2.FAMILY.defaults, "sliding_window": 4096},
    gguf=GgufFamily("olmo2", window_period=4, own_head=True),
)
