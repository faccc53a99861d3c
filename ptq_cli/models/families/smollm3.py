"""SmolLM3: a Llama with blocks that turn no queries and keys."""

from ptq_cli.models.families import llama
from ptq_cli.models.family import Config, Family, Folds
from ptq_cli.models.gguf_family import GgufFamily


def every_fourth_without(settings: Config) -> Config:
    """In llama.cpp every fourth block turns no queries and keys."""
    blocks = range(1, settings["num_hidden_layers"] + 1)
    return {"no_rope_layer_interval": 4, "no_rope_layers": [int(b % 4 > 0) for b in blocks]}


FAMILY = Family(
    name="smollm3",
    names=llama.FAMILY.names,
    defaults={
        "tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 2e6, "no_rope_layer_interval": 4,
    },
    keys={"use_windows": "use_sliding_window"},
    folds=Folds(),
    gguf=GgufFamily("smollm3", permuted=True, assumed=every_fourth_without),
)  # fmt: skip
