"""OLMo 3: OLMo 2 with a window in three of four blocks, whose rotary embeddings are plain."""

from dataclasses import replace

from ptq_cli.models.families import olmo2

FAMILY = replace(
    olmo2.FAMILY,
    name="olmo3",
    defaults={**olmo2.FAMILY.defaults, "sliding_window": 4096},
    gguf=replace(olmo2.GGUF, window_period=4),
)
