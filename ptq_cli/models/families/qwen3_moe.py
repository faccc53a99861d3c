"""Qwen3-MoE: Qwen3 with a mixture of experts instead of the MLP in all or some of its blocks."""

from dataclasses import replace

from ptq_cli.models.families import qwen2, qwen3
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily
from ptq_cli.models.names import ExpertNames

EXPERTS = ExpertNames(
    router="mlp.gate",
    expert="mlp.experts.{}",
    inputs=("gate_proj", "up_proj"),
    output="down_proj",
)

EVERYWHERE = {"dense_blocks": [], "sparse_step": 1}  # every block has experts

FAMILY = Family(
    name="qwen3_moe",
    names=replace(qwen3.FAMILY.names, experts=EXPERTS),
    defaults={
        **qwen2.FAMILY.defaults,
        "num_key_value_heads": 4, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    },
    keys={
        "num_experts": "num_local_experts", "expert_size": "moe_intermediate_size",
        "dense_blocks": "mlp_only_layers", "sparse_step": "decoder_sparse_step",
        "use_windows": "use_sliding_window",
    },
    folds=Folds(),
    forward=Forward(biases=qwen3.BIASES, slides=lambda config, index: True),
    gguf=GgufFamily(
        "qwen3moe",
        assumed=lambda settings: {**EVERYWHERE, "norm_topk_prob": True},
        sizes={"expert_feed_forward_length": "expert_size"},
        model_class="Qwen3MoeForCausalLM",
    ),
)  # fmt: skip
