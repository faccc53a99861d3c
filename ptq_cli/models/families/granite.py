"""Granite: a Llama whose embeddings, scores, branches and logits are multiplied by numbers of
config.json."""

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily

FAMILY = Family(
    name="granite",
    names=llama.FAMILY.names,
    defaults={
        **llama.FAMILY.defaults,
        "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    keys={
        "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
        "attention_scale": "attention_multiplier", "logit_divisor": "logits_scaling",
    },
    folds=Folds(),
    forward=Forward(biases=llama.BIASES),
    gguf=GgufFamily(
        "granite",
        permuted=True,
        biases=True,
        frequency_factors=True,
        factors={
            "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling",
        },
        model_class="GraniteForCausalLM",
    ),
)  # fmt: skip
