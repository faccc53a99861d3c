"""How the keys and values that attention caches are rounded when the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError

_KEYS, _VALUES = ".k_scale", ".v_scale"


@dataclass(frozen=True)
class KVCache:
    """Keys (after their rotation) and values are rounded to E4M3 with scales that are known
    beforehand: `key ≈ k_scale · level`, levels within ±448.

    modules: the attentions, in the order of the blocks; `<module>.k_scale` and `<module>.v_scale`
        are the tensors
    n_heads: key heads
    per_head: whether each key head has a scale of its own, [n_heads, 1, 1]; else [1] for all
    dtype: of the scales, in safetensors' word
    """

    modules: tuple[str, ...]
    n_heads: int
    per_head: bool
    dtype: str

    @property
    def setting(self) -> str:
        """The value of `--kv-cache` that makes such a cache."""
        return "fp8-head" if self.per_head else "fp8"

    def specs_of(self, module: str) -> tuple[TensorSpec, TensorSpec]:
        """The scales of an attention's keys and of its values."""
        shape = (self.n_heads, 1, 1) if self.per_head else (1,)
        keys, values = (TensorSpec(module + end, self.dtype, shape) for end in (_KEYS, _VALUES))
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of all scales."""
        return sum(spec.nbytes for spec in self.specs())

    def specs(self) -> Iterator[TensorSpec]:
        """The scales of all attentions."""
        return (spec for module in self.modules for spec in self.specs_of(module))


def find_kv_cache(specs: Mapping[str, TensorSpec]) -> KVCache | None:
    """The rounded cache that tensors named as its scales tell of, or None.

    Raises:
        InputError: one of a pair is missing, or they differ in shape or dtype.
    """
    ends = (_KEYS, _VALUES)
    found = [name[: -len(end)] for name in specs for end in ends if name.endswith(end)]
    modules = tuple(dict.fromkeys(found))
    if not modules:
        return None
    first = specs.get(modules[0] + _KEYS) or specs[modules[0] + _VALUES]
    per_head = len(first.shape) == 3
    cache = KVCache(modules, first.shape[0] if per_head else 0, per_head, first.dtype)
    for spec in cache.specs():
        own = specs.get(spec.name)
        if own is None:
            raise InputError(f"tensor {spec.name!r} is missing, a scale of the key-value cache")
        if own != spec or own.dtype not in ("F32", "F16", "BF16"):
            raise InputError(
                f"tensor {spec.name!r} is {own.dtype} {list(own.shape)}; scales of the key-value"
                f" cache are F32, F16 or BF16, all alike, [1] or [key heads, 1, 1]"
            )
    return cache
