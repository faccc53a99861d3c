"""Qwen3-Next: three of four blocks have a gated delta rule instead of attention, whose values pass
a sigmoid gate of each channel; experts, one of them shared behind a gate. Norms store gain − 1, but
for that behind the delta rule."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.errors import InputError
from ptq_cli.models.block_sites import attention_sites
from ptq_cli.models.families import qwen2_moe, qwen3, qwen3_moe
from ptq_cli.models.family import Config, Family, FamilySite, Folds
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.gated_delta import GatedDelta
from ptq_cli.models.forward.reader import BlockReader, Forward, number
from ptq_cli.models.forward.rope import not_known
from ptq_cli.models.forward.usual import attention_of

_NAMES = replace(
    qwen3_moe.FAMILY.names,
    experts=qwen2_moe.EXPERTS,
    alike=(("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),),
    buffers=(
        *qwen3_moe.FAMILY.names.buffers,
        "linear_attn.A_log",
        "linear_attn.dt_bias",
        "linear_attn.conv1d.weight",
        "linear_attn.norm.weight",
    ),
)
_DELTA_RULE = (
    FamilySite(_NAMES.alike[0], norm="input_layernorm"),
    FamilySite(
        ("linear_attn.out_proj",), reason="the norm that feeds it has the same gains for all heads"
    ),
)

_KINDS = ("linear_attention", "full_attention")


def _kind(config: Config, index: int) -> str:
    """What mixes the tokens of a block; without `layer_types`, every n-th has attention."""
    every = number(config, "full_attention_interval", {})
    given = config.get("layer_types")
    kind = given[index] if given else _KINDS[(index + 1) % every == 0]
    if kind not in _KINDS:
        raise not_known(f"config.json's layer type {kind!r} is not known", _KINDS)
    return str(kind)


def _mixer(block: BlockReader) -> Branch:
    if _kind(block.settings, block.index) == "full_attention":
        return replace(attention_of(block), gated=True)
    n_keys, n_heads = block.number("linear_num_key_heads"), block.number("linear_num_value_heads")
    if n_heads % n_keys:
        raise InputError(
            f"config.json's linear_num_value_heads {n_heads} is not a multiple of its "
            f"linear_num_key_heads {n_keys}"
        )
    first, second = _NAMES.alike[0]
    return GatedDelta(
        inputs=(block.linear("linear_attn", first), block.linear("linear_attn", second)),
        output=block.linear("linear_attn", "linear_attn.out_proj"),
        module=f"{block.base}linear_attn",
        n_key_heads=n_keys,
        n_heads=n_heads,
        key_dim=block.number("linear_key_head_dim"),
        value_dim=block.number("linear_value_head_dim"),
        norm=replace(block.norm("linear_attn.norm"), offset=0.0),
        activation=block.settings["activation"],
        kernel_size=block.number("linear_conv_kernel_dim"),
    )


FAMILY = Family(
    name="qwen3_next",
    names=_NAMES,
    plus_one=True,
    defaults={
        **qwen3_moe.FAMILY.defaults,
        "num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25,
        "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "num_experts_per_tok": 10, "norm_topk_prob": True,
    },
    keys={**qwen3_moe.FAMILY.keys, "shared_expert_size": "shared_expert_intermediate_size"},
    folds=Folds(attentions=(attention_sites(_NAMES, Folds()), _DELTA_RULE)),
    forward=Forward(biases=qwen3.BIASES, partly=True, mixer=_mixer),
)  # fmt: skip
