"""The scales of a cache in FP8, found on the way through the blocks.

Once q, k and v of a block are rounded, the model caches the keys and values that it will cache; the
scales of the block are taken from these, and the rounded model goes on with what such a cache gives
back. (Where the float model alone runs, the scales are from it, and it goes on as it is.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.stream import Decode
from ptq_cli.calibration.streams import Streams
from ptq_cli.core.kv_cache import KVCache
from ptq_cli.errors import InputError
from ptq_cli.formats.common import SCALE_NAMES
from ptq_cli.numerics.kv_cache import cache_scales, rounded_cache, used_range
from ptq_cli.numerics.scales import SCALE_DTYPES, ScaleOverflow
from ptq_cli.run.work import Work
from ptq_cli.storage.tensors import as_array, as_bytes


class CacheInSequence:
    """What the loop over the blocks does about the cache; what an interrupted run found is kept."""

    def __init__(self, work: Work, cache: KVCache) -> None:
        self.work, self.cache = work, cache
        finished = [module for module in cache.modules if work.staging.finished(_unit(module))]
        self._missing = [module for module in cache.modules if module not in finished]
        for module in finished:
            self._place(module)

    @property
    def orders(self) -> list[tuple[int, int]]:
        """The blocks whose scales are to be found, each with its first stage."""
        return [(self.cache.modules.index(module), 0) for module in self._missing]

    def settle(self, streams: Streams, rounded: Mapping[str, Decode]) -> None:
        """Find the scales of the block in hand, where its first stage is; from then on the rounded
        model caches in FP8. rounded: what gives the tensors of the stage in the rounded model"""
        block, stage = streams.order
        if stage != 0:
            return
        module = self.cache.modules[block]
        if module in self._missing:
            self._find(module, streams.main.cache_reach(rounded))
            self._missing.remove(module)
            self._place(module)
        if streams.source.feedback:
            streams.main.caches[block] = rounded_cache(*self._scales(module))

    def _find(self, module: str, reach: NDArray[np.float32]) -> None:
        """Stage the scales of a block. reach: as of `Stream.cache_reach`"""
        if not np.isfinite(reach).all():
            raise InputError(
                f"{module}: the model computes keys or values that are not finite",
                hint="is the checkpoint sound?",
            )
        kind = SCALE_NAMES[self.cache.dtype]
        try:
            scales = [cache_scales(own[0], self.cache.per_head, kind) for own in reach]
        except ScaleOverflow as error:
            raise InputError(f"{module}: keys or values: {error.message}") from None
        tensors = [
            as_bytes(spec.name, own.astype(SCALE_DTYPES[kind]).reshape(spec.shape))
            for spec, own in zip(self.cache.specs_of(module), scales, strict=True)
        ]
        keys, values = (_said(*both) for both in zip(reach, scales, strict=True))
        row = {"module": module, "keys": keys, "values": values}
        self.work.staging.put(_unit(module), tensors, row)

    def _place(self, module: str) -> None:
        """Have the scales copied to their places in the output."""
        self.work.copy.put(self.work.staging.store.stored(_unit(module)))

    def _scales(self, module: str) -> list[NDArray[np.float32]]:
        """Those of keys and of values, as they are stored."""
        tensors = self.work.staging.store.tensors(_unit(module))
        return [as_array(tensor).astype(np.float32).reshape(-1) for tensor in tensors]

    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """What the report says of each block, once all scales are found."""
        store = self.work.staging.store
        return tuple(store.result(_unit(module)) for module in self.cache.modules)


def _said(reach: NDArray[np.float32], scales: NDArray[np.float32]) -> dict[str, float | None]:
    """How far keys or values reach, and how much of FP8's range that is: of the head that uses the
    least of it, and on held-out tokens of the one that uses the most; above 1 it is clipped.

    reach: of calibration and of held-out tokens, [2, n_kv_heads]
    """
    used, heldout = (used_range(own, scales) for own in reach)
    return {
        "absmax": float(reach[0].max()),
        "used": float(used.min()),
        "heldout_used": float(heldout.max()) if reach[1].any() else None,
    }


def _unit(module: str) -> str:
    """The name of the unit that holds the scales of an attention."""
    return f"kv cache {module}"
