"""DeepSeek-V2 and V3: queries, and keys with values, through narrow linears (MLA); experts with
shared ones beside them, but for the first blocks."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen3_moe
from ptq_cli.models.family import Family

FAMILY = Family(
    name="deepseek_v3",
    other_types=("deepseek_v2", "kimi_k2", "glm4_moe_lite"),
    names=replace(
        llama.FAMILY.names,
        qkv=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        experts=qwen3_moe.FAMILY.names.experts,
        norms={
            **llama.FAMILY.names.norms,
            "q": "self_attn.q_a_layernorm",
            "k": "self_attn.kv_a_layernorm",
        },
    ),
)
