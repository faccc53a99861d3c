"""Tensors of a GGUF file whose architecture is not known here: by their names alone, which are the
same in all architectures, it is told what each is.

    blk.3.attn_q.weight                 a linear of block 3, [out_features, in_features]
    blk.3.ffn_up_exps.weight            the experts of block 3, [experts, out_features, in_features]
    token_embd.weight, output.weight    the embedding and the head
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ptq_cli.core.tensors import TensorSpec

ARCHITECTURE = "general.architecture"  # in place of config.json's model_type
_EXPERTS = re.compile(r"_(ch)?exps\.weight$")
# What llama.cpp does not quantize either, whatever is asked for.
_LEFT_ALONE = (
    ("norm", re.compile(r"_norm\.weight$|(^|\.)norm\w*\.weight$")),
    ("router", re.compile(r"\.ffn_gate_inp\w*\.weight$")),
    ("embedding", re.compile(r"(^|\.)(\w*token_embd|position_embd|token_types|patch_embd)\.")),
    ("output head", re.compile(r"^(output|cls|cls\.output)\.weight$")),
    ("convolution", re.compile(r"\.(ssm_conv1d\w*|shortconv\.conv|conv1d|conv_dw)\.weight$")),
    ("relative places", re.compile(r"\.attn_rel_b\.weight$")),
    ("small", re.compile(r"altup|laurel|per_layer_model_proj|\.time_mix_(first|lerp_fused)\.")),
    ("small", re.compile(r"\.time_mix_(decay_)?[wvag][012]\.weight$")),
)


def goes_by_gguf_names(config: Mapping[str, Any]) -> bool:
    """Whether this, in place of config.json, says that tensors have their names in GGUF."""
    return ARCHITECTURE in config


def left_alone_in_gguf(spec: TensorSpec) -> str | None:
    """Why a matrix is left alone unless asked for, by its name in GGUF; None: it is a linear."""
    for kind, pattern in _LEFT_ALONE:
        if pattern.search(spec.name):
            return kind
    return None if spec.name.endswith(".weight") else "not a .weight"


def holds_experts(spec: TensorSpec) -> bool:
    """Whether a tensor holds the weights of all experts of a block, one after the other."""
    return len(spec.shape) == 3 and _EXPERTS.search(spec.name) is not None


def expert_name(stacked: str, expert: int) -> str:
    """The name of one expert's weight: `blk.3.ffn_up_exps.7.weight`."""
    return f"{stacked.removesuffix('.weight')}.{expert}.weight"
