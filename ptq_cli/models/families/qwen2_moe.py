"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one shared by all tokens behind a gate."""

from dataclasses import replace

from ptq_cli.models.families import qwen2, qwen3_moe
from ptq_cli.models.family import Config, Family, Folds
from ptq_cli.models.forward.reader import Forward, number
from ptq_cli.models.gguf_family import GgufFamily

EXPERTS = replace(
    qwen3_moe.EXPERTS, shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"
)


def slides(config: Config, index: int) -> bool:
    """Whether a block has a window."""
    return index % 2 == 0 and index < number(config, "max_window_layers", {}, least=0)


FAMILY = Family(
    name="qwen2_moe",
    names=replace(qwen2.FAMILY.names, experts=EXPERTS),
    defaults={
        **qwen3_moe.FAMILY.defaults,
        "num_key_value_heads": 16, "num_experts_per_tok": 4, "qkv_bias": True,
    },
    keys={
        **{own: key for own, key in qwen3_moe.FAMILY.keys.items() if own != "num_experts"},
        "shared_expert_size": "shared_expert_intermediate_size",
    },
    folds=Folds(),
    forward=Forward(biases={"qkv": "qkv_bias"}, slides=slides, by_type=True),
    gguf=GgufFamily(
        "qwen2moe",
        usual_heads=True,
        assumed=lambda settings: {**qwen3_moe.EVERYWHERE, "norm_topk_prob": False},
        sizes={
            "expert_feed_forward_length": "expert_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        own_head=True,
        model_class="Qwen2MoeForCausalLM",
    ),
)  # fmt: skip
