"""The key-value cache of compressed-tensors: its scales, and `kv_cache_scheme` beside the groups.

compressed-tensors 0.20 rounds what a module caches whose class is an attention with k_proj, v_proj
or qkv_proj, as in all families that have a forward here and that this layout can hold; keys are
rounded behind their rotation, for the tokens of a prompt too.
"""

from __future__ import annotations

from typing import Any

from ptq_cli.core.kv_cache import KVCache, find_kv_cache
from ptq_cli.core.plugins import CacheLayout, Contents
from ptq_cli.errors import InputError
from ptq_cli.formats import common

_KEY, _WHERE = "kv_cache_scheme", "quantization_config"


def _declare(cache: KVCache) -> dict[str, Any]:
    strategy = "attn_head" if cache.per_head else "tensor"
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    return {_KEY: {**scheme, "strategy": strategy}}


def _read(contents: Contents) -> KVCache | None:
    settings = common.mapping(contents.config, _WHERE, "config.json")
    scheme = common.mapping(settings, _KEY, _WHERE)
    if not scheme:
        return None
    strategy = scheme.get("strategy")
    stated = [scheme.get(key) for key in ("num_bits", "type", "symmetric", "dynamic")]
    if stated != [8, "float", True, False] or strategy not in ("tensor", "attn_head"):
        raise InputError(
            f"{_WHERE}: {_KEY} of type {scheme.get('type')!r}, {scheme.get('num_bits')} bits,"
            f" strategy {strategy!r}, dynamic {scheme.get('dynamic')} is not understood",
            hint="take it out: it says nothing of the weights",
        )
    cache = find_kv_cache(contents.specs)
    if cache is None or cache.per_head != (strategy == "attn_head"):
        raise InputError(f"{_WHERE}: {_KEY} says {strategy}, but no k_scale is of that shape")
    return cache


KV_CACHE = CacheLayout(declare=_declare, read=_read)
