"""Falcon: q, k and v in one linear; attention and MLP side by side behind one norm (7B, 11B) or two
(40B, 180B), or one after the other (Falcon-RW, with ALiBi)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.families import bloom
from ptq_cli.models.family import Condition, Config, Family, Folds, behind
from ptq_cli.models.forward.attention import HeadBias, Packing, alibi_slopes
from ptq_cli.models.forward.layers import Weights
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import BlockReader, Forward
from ptq_cli.models.forward.usual import attention_of

_IN_TURN = bloom.FAMILY.names.norms
_ONE = {"attention_in": "input_layernorm", "mlp_in": "input_layernorm"}
_TWO = {"attention_in": "ln_attn", "mlp_in": "ln_mlp"}


def _attention(block: BlockReader) -> MultiHead:
    settings, n_heads = block.settings, block.number("num_attention_heads")
    n_kv_heads = n_heads
    if settings["new_decoder_architecture"] and settings.get("num_kv_heads") is not None:
        n_kv_heads = block.number("num_kv_heads")
    elif settings["multi_query"] and not settings["new_decoder_architecture"]:
        n_kv_heads = 1
    if n_heads % n_kv_heads:
        raise InputError(
            f"config.json has {n_heads} attention heads, not a multiple of {n_kv_heads} key heads"
        )
    attention = replace(attention_of(block), n_kv_heads=n_kv_heads)
    if not settings["alibi"]:
        return attention
    scale = np.float32(attention.scale)

    def bias(weights: Weights, packing: Packing) -> HeadBias:
        return HeadBias(keys=scale * alibi(n_heads, packing.mask.shape[1]))

    return replace(attention, bias=bias)


def alibi(n_heads: int, n_keys: int) -> FloatArray:
    """float32 [n_heads, n_keys], of the numbers that Falcon was trained with: the slopes, the
    numbers of keys and their products are rounded to bfloat16."""
    slopes = alibi_slopes(n_heads).astype(ml_dtypes.bfloat16)
    products = slopes[:, None] * np.arange(n_keys).astype(ml_dtypes.bfloat16)
    return np.asarray(products, dtype=np.float32)


def _parallel(config: Config) -> bool:
    return bool(config["new_decoder_architecture"] or config["parallel_attn"])


def _norms(config: Config) -> Mapping[str, str]:
    if not _parallel(config):
        return _IN_TURN
    two = config["new_decoder_architecture"] and config.get("num_ln_in_parallel_attn") in (None, 2)
    return _TWO if two else _ONE


FAMILY = Family(
    name="falcon",
    names=replace(bloom.FAMILY.names, embedding_norm=None),
    own_class=True,
    defaults={
        "activation": "gelu", "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "alibi": False,
        "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True,
    },
    keys={"norm_eps": "layer_norm_epsilon", "intermediate_size": "ffn_hidden_size"},
    folds=Folds(
        values="q k v per head",
        inner_if=Condition("activation", "relu", behind("an activation other than relu")),
        norms=(_ONE, _TWO),
    ),
    forward=Forward(
        gated=False,
        centred=True,
        turns=lambda config, index: not config["alibi"],
        per_head=True,
        parallel=_parallel,
        biases={"qkv": "bias", "output": "bias", "mlp": "bias"},
        mixer=_attention,
        norms=_norms,
    ),
)  # fmt: skip
