"""GLM-4.7-Flash: DeepSeek-V3 in which config.json says of each block whether it has experts."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.models.families import deepseek_v3
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.reader import BlockReader
from ptq_cli.models.forward.usual import mlp_of


def feed_forward(block: BlockReader) -> Branch:
    """Experts, or an MLP; where nothing is said only the first block has that."""
    sparse = block.index > 0
    if block.settings.get("mlp_layer_types"):
        sparse = block.entry("mlp_layer_types") == "sparse"
    return deepseek_v3.experts(block) if sparse else mlp_of(block)


FAMILY = replace(
    deepseek_v3.FAMILY,
    name="glm4_moe_lite",
    other_types=(),
    defaults={
        **deepseek_v3.FAMILY.defaults,
        "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "v_head_dim": 256, "n_routed_experts": 64,
        "moe_intermediate_size": 1536, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.8,
    },
    forward=replace(deepseek_v3.FORWARD, feed_forward=feed_forward),
)  # fmt: skip
