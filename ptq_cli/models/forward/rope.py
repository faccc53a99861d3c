"""Rotary position embeddings, with the ways of stretching them that config.json may ask for.

Channel i of the first half of a head turns together with channel i of its second half by
`position · frequency_i` (Su et al., arXiv 2104.09864); a partial rotary factor leaves the last
channels of a head alone. `kind` says how the frequencies `theta^(−2i/dims)` are changed:

default   not at all
linear    divided by `factor`
dynamic   a larger theta for sequences longer than `max_length` ("NTK")
llama3    slow ones divided by `factor`, fast ones kept, between them a ramp in the wavelength
yarn      the same with a ramp in the channel (arXiv 2309.00071), cos and sin scaled
longrope  divided channel by channel by one of two lists (arXiv 2402.13753), cos and sin scaled
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError


@dataclass(frozen=True)
class Rope:
    """How the positions of one block turn queries and keys.

    dims: channels of a head that turn, the first ones
    max_length, original_length: tokens the model is for, and was trained on before stretching
    amplitude: factor of cos and sin (yarn, longrope)
    """

    dims: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    max_length: int = 0
    original_length: int = 0
    amplitude: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def rotations(
    rope: Rope, positions: NDArray[np.integer[Any]], length: int
) -> tuple[FloatArray, FloatArray]:
    """cos and sin, float32 [n_tokens, 1, dims / 2], of the angles at `positions` [n_tokens].

    length: tokens in a (padded) sequence; dynamic and longrope depend on it.
    """
    frequencies = KINDS[rope.kind](rope, length).astype(np.float32)
    angles = positions.astype(np.float32)[:, None, None] * frequencies
    cosine, sine = np.cos(angles), np.sin(angles)
    if rope.amplitude != 1:
        cosine *= np.float32(rope.amplitude)
        sine *= np.float32(rope.amplitude)
    return cosine, sine


def rotate(heads: FloatArray, cosine: FloatArray, sine: FloatArray) -> None:
    """Turns the first channels of `heads`, float32 [n_tokens, n_heads, head_dim], in place."""
    half = cosine.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    turned = first * cosine
    turned -= second * sine
    second *= cosine
    second += first * sine
    first[...] = turned


def _default(rope: Rope, length: int) -> FloatArray:
    exponents = np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims
    result: FloatArray = 1.0 / rope.theta**exponents
    return result


def _linear(rope: Rope, length: int) -> FloatArray:
    result: FloatArray = _default(rope, length) / rope.factor
    return result


def _dynamic(rope: Rope, length: int) -> FloatArray:
    length = max(length, rope.max_length)
    stretch = rope.factor * length / rope.max_length - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.dims / (rope.dims - 2))
    return _default(Rope(rope.dims, theta), length)


def _llama3(rope: Rope, length: int) -> FloatArray:
    plain = _default(rope, length)
    turns = rope.original_length * plain / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    result: FloatArray = kept * plain + (1 - kept) * plain / rope.factor
    return result


def _yarn(rope: Rope, length: int) -> FloatArray:
    def channel(turns: float) -> float:
        wavelength = rope.original_length / (turns * 2 * math.pi)
        return rope.dims * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    width = high - low if high != low else 0.001
    ramp = (np.arange(rope.dims // 2, dtype=np.float64) - low) / width
    plain, stretched = _default(rope, length), np.clip(ramp, 0.0, 1.0)
    result: FloatArray = plain * (1 - stretched) + plain / rope.factor * stretched
    return result


def _longrope(rope: Rope, length: int) -> FloatArray:
    factors = rope.long_factor if length > rope.original_length else rope.short_factor
    result: FloatArray = _default(rope, length) / np.asarray(factors)
    return result


KINDS: dict[str, Callable[[Rope, int], FloatArray]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

_ALIASES = {"su": "longrope", "none": "default"}


def read_rope(
    parameters: Mapping[str, Any], head_dim: int, max_length: int, original_length: int | None
) -> Rope:
    """The rope of one block from config.json's `rope_parameters` (or `rope_scaling`).

    original_length: `original_max_position_embeddings` where it stands outside `parameters`.
    Raises InputError for a kind that is not known and for keys that are missing.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = _ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise InputError(
            f"config.json asks for rotary embeddings of type {kind!r}; known are "
            f"{', '.join(sorted(KINDS))}",
            hint="bring activations with --activations, which works for any model",
        )
    original = original_length or parameters.get("original_max_position_embeddings") or max_length
    given = {
        name: parameters[name]
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate")
        if parameters.get(name) is not None
    }
    dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    factor = parameters.get("factor")
    stretch = float(max_length / original if factor is None else factor)
    _check(kind, parameters, dims, factor)
    return Rope(
        dims=dims,
        theta=float(parameters["rope_theta"]),
        kind=kind,
        factor=stretch,
        max_length=max_length,
        original_length=original,
        amplitude=_amplitude(kind, parameters, stretch, original),
        short_factor=tuple(parameters.get("short_factor") or ()),
        long_factor=tuple(parameters.get("long_factor") or ()),
        **given,
    )


def _check(kind: str, parameters: Mapping[str, Any], dims: int, factor: float | None) -> None:
    if dims < 2 or dims % 2:
        raise InputError(f"config.json turns {dims} channels of a head; it must be even and not 0")
    if kind in ("linear", "dynamic", "llama3") and factor is None:
        raise InputError(f"config.json asks for {kind!r} rotary embeddings without a `factor`")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        found = len(parameters.get(name) or ())
        if found != dims // 2:
            raise InputError(f"config.json's {name} has {found} numbers and needs {dims // 2}")


def _amplitude(kind: str, parameters: Mapping[str, Any], factor: float, original: int) -> float:
    given = parameters.get("attention_factor")
    if kind not in ("yarn", "longrope") or factor <= 1:
        return float(given) if kind in ("yarn", "longrope") and given is not None else 1.0
    if given is not None:
        return float(given)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim:
        above, below = (0.1 * m * math.log(factor) + 1 for m in (mscale, all_dim))
        return float(above / below)
    return 0.1 * math.log(factor) + 1
