"""Command-R7B and Command-A: Command-R with a window in three of four blocks; the fourth turns no
queries and keys."""

from dataclasses import replace

from ptq_cli.models.families import cohere, gemma3
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import BlockReader
from ptq_cli.models.forward.usual import attention_of
from ptq_cli.models.gguf_family import GgufFamily


def _attention(block: BlockReader) -> MultiHead:
    attention = attention_of(block)
    return attention if attention.window else replace(attention, rope=None)


FAMILY = replace(
    cohere.FAMILY,
    name="cohere2",
    defaults={**cohere.FAMILY.defaults, "rope_theta": 10000.0, "sliding_window": 4096},
    sizes={
        "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528,
        "num_hidden_layers": 40, "num_attention_heads": 64,
    },
    forward=replace(
        cohere.FORWARD,
        mixer=_attention,
        slides=lambda config, index: gemma3.slides(config, index, 4),
        by_type=True,
    ),
    gguf=GgufFamily(
        "cohere2",
        layer_norms=True,
        usual_heads=True,
        factors={"logit_scale": "logit_scale"},
        window_period=4,
        own_head=False,
        model_class="Cohere2ForCausalLM",
    ),
)  # fmt: skip
