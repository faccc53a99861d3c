"""Command-R7B and Command-A: Command-R with a window in three of four blocks; the fourth turns no
queries and keys."""

from dataclasses import replace

from ptq_cli.models.families import cohere
from ptq_cli.models.gguf_family import GgufFamily

FAMILY = replace(
    cohere.FAMILY,
    name="cohere2",
    defaults={
        **cohere.FAMILY.defaults,
        "hidden_act": "silu", "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "logit_scale": 0.0625,
        "sliding_window": 4096,
    },
    keys={"norm_eps": "layer_norm_eps"},
    gguf=GgufFamily(
        "cohere2",
        layer_norms=True,
        usual_heads=True,
        factors={"logit_scale": "logit_scale"},
        window_period=4,
        own_head=False,
    ),
)  # fmt: skip
