"""Tensor names of llama, qwen2 and qwen3 in GGUF, and the row order of llama's q and k."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ptq_cli.core.tensors import Array
from ptq_cli.errors import InputError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QWEN3 = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def architecture_of(config: Mapping[str, Any]) -> str:
    """GGUF's name of the architecture. Raises InputError for one that is not known here."""
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        raise InputError(
            f"gguf: model_type {name!r} is not known, only {', '.join(ARCHITECTURES)}",
            hint="another --format",
        )
    return str(name)


def tensor_name(name: str, architecture: str) -> str:
    """The name in GGUF of a tensor in a checkpoint. Raises InputError where it has none."""
    module, _, ending = name.rpartition(".")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    own = _WHOLE.get(module) if block is None else _block_names(architecture).get(block[2])
    if own is None or ending not in ("weight", "bias"):
        raise InputError(f"tensor {name!r} has no name in gguf's architecture {architecture}")
    return f"{own}.{ending}" if block is None else f"blk.{block[1]}.{own}.{ending}"


def module_of(name: str, architecture: str) -> str:
    """The module of a tensor in GGUF. Raises InputError for an unknown name or architecture."""
    if architecture not in ARCHITECTURES:
        raise InputError(f"gguf: general.architecture {architecture!r} is not understood")
    own = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(?:weight|bias)", name)
    table = {} if own is None else _WHOLE if own[1] is None else _block_names(architecture)
    for module, stored in table.items():
        if own is not None and stored == own[2]:
            return module if own[1] is None else f"model.layers.{own[1]}.{module}"
    raise InputError(f"tensor {name!r} is not understood in gguf's architecture {architecture}")


def _block_names(architecture: str) -> dict[str, str]:
    return _BLOCK | _QWEN3 if architecture == "qwen3" else _BLOCK


def permuted_heads(module: str, config: Mapping[str, Any]) -> int | None:
    """Heads within which GGUF orders the rows of this module otherwise, or None: q and k of llama,
    weights and biases."""
    if config.get("model_type") != "llama":
        return None
    heads = int(config["num_attention_heads"])
    if module.endswith(".self_attn.q_proj"):
        return heads
    if module.endswith(".self_attn.k_proj"):
        return int(config.get("num_key_value_heads") or heads)
    return None


def permute_rows(rows: Array, heads: int) -> Array:
    """Checkpoint order to GGUF's: in each head, row i of the first half goes before row i of the
    second. Rows may be packed ones: [out_features, …]."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def unpermute_rows(rows: Array, heads: int) -> Array:
    """GGUF's order to the checkpoint's: even rows of a head, then odd ones."""
    own = rows.reshape(heads, len(rows) // heads, *rows.shape[1:])
    result = own.copy()
    half = own.shape[1] // 2
    result[:, :half], result[:, half:] = own[:, ::2], own[:, 1::2]
    return result.reshape(rows.shape)
