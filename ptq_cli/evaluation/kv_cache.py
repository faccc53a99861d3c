"""The rounded cache of a quantized folder, for the versions of a model that an evaluation runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptq_cli.core.kv_cache import KVCache
from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.formats.common import SCALE_NAMES
from ptq_cli.models.forward.attention import Cache
from ptq_cli.numerics.kv_cache import cache_scales, head_absmax, round_cached, rounded_cache
from ptq_cli.storage.quantized import QuantizedFolder

Caches = dict[int, Cache]  # by block, what becomes of the keys and values that it caches


def stored_caches(attentions: Sequence[str], quantized: QuantizedFolder) -> Caches:
    """What the folder's scales make of keys and values; empty where its cache is not rounded.

    attentions: the modules of the blocks, in order

    Raises:
        InputError: scales of a module that is none of them.
    """
    if quantized.kv_cache is None:
        return {}
    found = {}
    for module in quantized.kv_cache.modules:
        if module not in attentions:
            raise InputError(
                f"{quantized.checkpoint.path}: scales of a key-value cache in {module!r}, which is"
                " no attention of the model"
            )
        specs = quantized.kv_cache.specs_of(module)
        scales = (quantized.checkpoint.read(spec.name) for spec in specs)
        keys, values = (own.astype(np.float32).reshape(-1) for own in scales)
        found[attentions.index(module)] = rounded_cache(keys, values)
    return found


def nearest_caches(stored: Caches, cache: KVCache | None) -> Caches:
    """The same with scales that are found anew in every batch, as those of static inputs are: what
    is stored belongs to what was quantized."""
    if cache is None:
        return {}
    per_head, kind = cache.per_head, SCALE_NAMES[cache.dtype]

    def round_both(keys: FloatArray, values: FloatArray) -> None:
        for heads in (keys, values):
            round_cached(heads, cache_scales(head_absmax(heads), per_head, kind))

    return dict.fromkeys(stored, round_both)
