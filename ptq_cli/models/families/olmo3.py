"""OLMo 3: OLMo 2 with a window in three of four blocks, whose rotary embeddings are plain."""

from dataclasses import replace

from ptq_cli.models.families import olmo2

FAMILY = replace(
    olmo2.FAMILY,
    name="olmo3",
    defaults={**olmo2.FAMILY.defaults, "rope_theta": 500000.0, "sliding_window": 4096},
    fixed={"local_rope_theta": 500000.0},  # that in rope_parameters counts
    forward=replace(olmo2.FORWARD, slides=lambda config, index: (index + 1) % 4 != 0, by_type=True),
    gguf=replace(olmo2.GGUF, window_period=4, model_class="Olmo3ForCausalLM"),
)
