"""Queries, keys and values: from the inputs of an attention to its heads, normed and rotated."""

from __future__ import annotations

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.models.forward import layers
from ptq_cli.models.forward.architecture import Architecture, Block
from ptq_cli.models.forward.attention import Packing
from ptq_cli.models.forward.layers import Weights
from ptq_cli.models.forward.rope import rotate, rotations


def make_heads(
    arch: Architecture,
    block: Block,
    weights: Weights,
    inputs: FloatArray,
    packing: Packing,
    roles: str = "qkv",
) -> list[FloatArray]:
    """The queries, keys and values that attention works on, each float32
    [n_tokens, heads, head_dim]. roles: which of them
    """
    parts = _projected(arch, block, weights, inputs, roles)
    heads = [np.ascontiguousarray(x).reshape(len(inputs), -1, arch.head_dim) for x in parts]
    named = dict(zip(roles, heads, strict=True))
    for role in "qk":
        if role in named and role in block.norms:
            flat = named[role].reshape(-1, arch.head_dim)
            flat[...] = layers.apply_norm(block.norms[role], weights, flat)
    if block.rope is not None:
        cosine, sine = rotations(block.rope, packing.positions, packing.mask.shape[1])
        for role in "qk":
            if role in named:
                rotate(named[role], cosine, sine)
    return heads


def _projected(
    arch: Architecture, block: Block, weights: Weights, inputs: FloatArray, roles: str
) -> list[FloatArray]:
    """The outputs of the linears, or the parts of those of the one that is fused."""
    if len(block.qkv) > 1:
        linears = dict(zip("qkv", block.qkv, strict=True))
        return [layers.apply_linear(linears[role], weights, inputs) for role in roles]
    query, shared = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    outputs = layers.apply_linear(block.qkv[0], weights, inputs)
    parts = dict(zip("qkv", np.split(outputs, [query, query + shared], axis=1), strict=True))
    return [parts[role] for role in roles]
