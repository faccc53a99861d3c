"""Mixtral: Mistral with a mixture of experts instead of the MLP."""

from dataclasses import replace

from ptq_cli.models.families import llama
from ptq_cli.models.family import Family, Folds
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily
from ptq_cli.models.names import ExpertNames

FAMILY = Family(
    name="mixtral",
    names=replace(
        llama.FAMILY.names,
        mlp_in=(),
        mlp_out="",
        experts=ExpertNames(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}",
            inputs=("w1", "w3"),
            output="w2",
        ),
        dense=("mlp.gate",),  # the router, where transformers 5 saved its own names
    ),
    defaults={
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "max_position_embeddings": 131072, "num_experts_per_tok": 2, "num_local_experts": 8,
        "num_key_value_heads": 8,
    },
    keys={"num_experts": "num_local_experts", "expert_size": "intermediate_size"},
    fixed={"norm_topk_prob": True},
    folds=Folds(),
    forward=Forward(slides=lambda config, index: True),
    gguf=GgufFamily(
        "llama",
        permuted=True,
        assumed=lambda settings: {"norm_topk_prob": True},
        aliases=(("mlp.", "block_sparse_moe."),),
        model_class="MixtralForCausalLM",
    ),
)  # fmt: skip
