"""DeepSeek-V2: as V3, but the softmax of the router's scores weighs the experts; V2-Lite has its
queries from one linear, and no groups."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.families import deepseek_v3
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.layers import Weights
from ptq_cli.models.forward.reader import BlockReader, number
from ptq_cli.models.forward.routers import softmax_router
from ptq_cli.models.forward.usual import mlp_of


def feed_forward(block: BlockReader) -> Branch:
    """An MLP in the first blocks, then experts."""
    settings = block.settings
    if block.index < number(settings, "first_k_dense_replace", block.keys, least=0):
        return mlp_of(block)
    method = settings["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise InputError(f"config.json's topk_method {method!r} is not known")
    groups = None if method == "greedy" else deepseek_v3.groups(block)
    usual, factor = deepseek_v3.with_shared(block), block.positive("routed_scaling_factor")

    def weigh(weights: Weights, scores: FloatArray) -> FloatArray:
        return softmax_router(scores, usual.top_k, groups=groups, factor=factor)

    return replace(usual, weigh=weigh)


FAMILY = replace(
    deepseek_v3.FAMILY,
    name="deepseek_v2",
    other_types=(),
    defaults={
        **deepseek_v3.FAMILY.defaults,
        "max_position_embeddings": 2048, "first_k_dense_replace": 0, "n_routed_experts": 64,
        "moe_intermediate_size": 1407, "n_shared_experts": 2, "topk_method": "greedy",
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "mlp_bias": False,
        "num_experts_per_tok": None, "n_group": None, "topk_group": None,
    },
    fixed={"rope_interleave": True},
    forward=replace(
        deepseek_v3.FORWARD,
        biases={**deepseek_v3.FORWARD.biases, "mlp": "mlp_bias"},
        feed_forward=feed_forward,
    ),
)  # fmt: skip
