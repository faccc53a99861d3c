"""Qwen3: a Llama with norms on the heads of q and k, and windows from some block on."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen2
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily

NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
BIASES = {"qkv": "attention_bias", "output": "attention_bias"}

FAMILY = Family(
    name="qwen3",
    names=replace(llama.FAMILY.names, norms={**llama.FAMILY.names.norms, **NORMS}),
    defaults={**qwen2.FAMILY.defaults, "head_dim": 128},
    sizes=qwen2.FAMILY.sizes,
    keys=qwen2.FAMILY.keys,
    folds=Folds(),
    forward=Forward(biases=BIASES, slides=qwen2.slides, by_type=True),
    gguf=GgufFamily("qwen3", model_class="Qwen3ForCausalLM"),
)
