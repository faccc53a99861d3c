"""Bamba: Mamba-2 blocks, whose Mamba linears no factors reach, and some with attention."""

from __future__ import annotations

from dataclasses import replace

from ptq_cli.errors import InputError
from ptq_cli.models.block_sites import attention_sites
from ptq_cli.models.families import llama
from ptq_cli.models.family import Config, Family, FamilySite, Folds
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.mamba import Mamba
from ptq_cli.models.forward.reader import BlockReader, Forward, numbers
from ptq_cli.models.forward.usual import attention_of

_NAMES = replace(
    llama.FAMILY.names,
    mlp_in=("feed_forward.gate_proj", "feed_forward.up_proj"),
    mlp_out="feed_forward.down_proj",
    norms={"attention_in": "input_layernorm", "mlp_in": "pre_ff_layernorm"},
    final_norm="final_layernorm",
    buffers=(
        *llama.FAMILY.names.buffers,
        "input_layernorm.weight",
        "mamba.A_log",
        "mamba.D",
        "mamba.dt_bias",
        "mamba.conv1d.weight",
        "mamba.conv1d.bias",
        "mamba.norm.weight",
    ),
)
_MAMBA = (
    FamilySite(("mamba.in_proj",), reason="it is a Mamba block's, which is left alone"),
    FamilySite(("mamba.out_proj",), reason="it is a Mamba block's, which is left alone"),
)


def _mixer(block: BlockReader) -> Branch:
    settings = block.settings
    if block.index in numbers(settings, "attn_layer_indices", block.keys):
        return attention_of(block)
    width = block.number("mamba_expand") * block.number("hidden_size")
    n_heads, n_groups = block.number("mamba_n_heads"), block.number("mamba_n_groups")
    size = settings["mamba_d_head"]
    head_dim = width // n_heads if size == "auto" else block.number("mamba_d_head")
    if head_dim * n_heads != width or n_heads % n_groups:
        raise InputError(
            f"config.json has {n_heads} Mamba heads of {head_dim} channels in {n_groups} groups "
            f"for mamba_expand · hidden_size = {width} channels"
        )
    return Mamba(
        input=block.linear("mamba", "mamba.in_proj"),
        output=block.linear("mamba", "mamba.out_proj"),
        module=f"{block.base}mamba",
        n_heads=n_heads,
        head_dim=head_dim,
        n_groups=n_groups,
        state_size=block.number("mamba_d_state"),
        time_limits=_time_limits(settings),
        convolution_bias=bool(settings["mamba_conv_bias"]),
        norm=replace(block.norm("mamba.norm"), affine=False),
        activation=settings["activation"],
        kernel_size=block.number("mamba_d_conv"),
    )


def _time_limits(config: Config) -> tuple[float, float]:
    """transformers 5 writes infinity as {"__float__": "Infinity"}."""
    low, high = config.get("time_step_limit") or (0.0, "inf")
    return float(low), float(high["__float__"] if isinstance(high, dict) else high)


FAMILY = Family(
    name="bamba",
    names=_NAMES,
    defaults={
        **llama.FAMILY.defaults,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "num_key_value_heads": 8,
        "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256,
        "mamba_expand": 2, "mamba_conv_bias": True, "mamba_d_conv": 4,
    },
    fixed={"partial_rotary_factor": 0.5},  # that in rope_parameters counts
    folds=Folds(attentions=(attention_sites(_NAMES, Folds()), _MAMBA)),
    forward=Forward(
        biases={**llama.BIASES, "mamba": "mamba_proj_bias"}, partly=True, mixer=_mixer
    ),
)  # fmt: skip
