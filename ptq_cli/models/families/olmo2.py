"""OLMo 2: norms stand behind the branches, and on all of q and of k; none feeds a linear."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen3
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily

FORWARD = Forward(norm_whole=True, biases=qwen3.BIASES)
GGUF = GgufFamily("olmo2", usual_heads=True, own_head=True)

FAMILY = Family(
    name="olmo2",
    names=replace(
        llama.FAMILY.names,
        norms={
            **qwen3.NORMS,
            "attention_out": "post_attention_layernorm",
            "mlp_out": "post_feedforward_layernorm",
        },
    ),
    defaults={**llama.FAMILY.defaults, "rms_norm_eps": 1e-5},
    folds=Folds(),
    forward=FORWARD,
    gguf=replace(GGUF, model_class="Olmo2ForCausalLM"),
)
