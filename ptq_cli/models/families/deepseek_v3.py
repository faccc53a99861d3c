"""DeepSeek-V2 and V3: queries, and keys with values, through narrow linears (MLA); experts with
shared ones beside them, but for the first blocks. V2-Lite has its queries from one linear."""

from dataclasses import replace

from ptq_cli.models.families import llama, qwen3_moe
from ptq_cli.models.family import Family, FamilySite, Folds

_BEHIND_KV_A = (
    FamilySite(("self_attn.kv_b_proj",), norm="self_attn.kv_a_layernorm"),
    FamilySite(("self_attn.o_proj",), after="self_attn.kv_b_proj", layout="k v per head"),
)

FAMILY = Family(
    name="deepseek_v3",
    other_types=("deepseek_v2", "kimi_k2", "glm4_moe_lite"),
    names=replace(
        llama.FAMILY.names,
        qkv=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        experts=replace(qwen3_moe.EXPERTS, shared="mlp.shared_experts"),
        buffers=(*llama.FAMILY.names.buffers, "mlp.gate.e_score_correction_bias"),
    ),
    folds=Folds(
        attentions=(
            (
                FamilySite(
                    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), norm="input_layernorm"
                ),
                FamilySite(("self_attn.q_b_proj",), norm="self_attn.q_a_layernorm"),
                *_BEHIND_KV_A,
            ),
            (
                FamilySite(
                    ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), norm="input_layernorm"
                ),
                *_BEHIND_KV_A,
            ),
        ),
    ),
)
