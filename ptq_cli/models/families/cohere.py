"""Command-R: one LayerNorm without bias feeds attention and MLP, which stand side by side; some
have norms on the heads of q and k. Neighbouring channels turn together."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen3
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward

_NORMS = {"attention_in": "input_layernorm", "mlp_in": "input_layernorm"}

FORWARD = Forward(
    centred=True,
    norm_bias=False,
    interleaved=True,
    parallel=lambda config: True,
    biases=qwen3.BIASES,
)

FAMILY = Family(
    name="cohere",
    names=replace(
        llama.FAMILY.names,
        norms=_NORMS,
        buffers=(
            *llama.FAMILY.names.buffers,
            *(f"{norm}.weight" for norm in qwen3.NORMS.values()),
        ),
    ),
    defaults={
        "tie_word_embeddings": True, "hidden_act": "silu", "layer_norm_eps": 1e-5,
        "rope_theta": 500000.0, "logit_scale": 0.0625, "max_position_embeddings": 8192,
    },
    keys={"norm_eps": "layer_norm_eps"},
    folds=Folds(),
    forward=replace(
        FORWARD,
        norms=lambda config: {**_NORMS, **(qwen3.NORMS if config.get("use_qk_norm") else {})},
    ),
)  # fmt: skip
