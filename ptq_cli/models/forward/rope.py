"""Rotary position embeddings, with the ways of stretching them that config.json may ask for.

Channel i of the first half of a head turns together with channel i of its second half by
`position · frequency_i` (Su et al., arXiv 2104.09864), or channel 2i with channel 2i + 1 where they
are interleaved; a partial rotary factor leaves the last channels of a head alone. `kind` says how
the frequencies `theta^(−2i/dims)` are changed:

default   not at all
linear    divided by `factor`
dynamic   a larger theta for sequences longer than `max_length` ("NTK")
llama3    slow ones divided by `factor`, fast ones kept, between them a ramp in the wavelength
yarn      the same with a ramp in the channel (arXiv 2309.00071), cos and sin scaled
longrope  divided channel by channel by one of two lists (arXiv 2402.13753), cos and sin scaled
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.forward.reader import positive, real

Frequencies = NDArray[np.float64]


@dataclass(frozen=True)
class Rope:
    """How the positions of one block turn queries and keys.

    dims: channels of a head that turn, the first ones
    max_length, original_length: tokens the model is for, and was trained on before stretching
    amplitude: factor of cos and sin (yarn, longrope)
    parameters: config.json's own, for what one kind alone asks for
    interleaved: neighbours turn together, not channels of the two halves
    """

    dims: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    max_length: int = 0
    original_length: int = 0
    amplitude: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False

    @property
    def score_factor(self) -> float:
        """What DeepSeek multiplies the scale of scores with where positions are stretched: the
        square of yarn's `mscale_all_dim` in logarithms of the factor."""
        scale = self.parameters.get("mscale_all_dim")
        if not scale or self.kind == "default":
            return 1.0
        return _mscale(self.factor, scale) ** 2


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


def rotate(
    heads: FloatArray, cosine: FloatArray, sine: FloatArray, interleaved: bool = False
) -> None:
    """Turns the first channels of `heads`, float32 [n_tokens, n_heads, head_dim], in place.

    interleaved: as of `Rope`
    """
    half = cosine.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    if interleaved:
        first, second = heads[..., : 2 * half : 2], heads[..., 1 : 2 * half : 2]
    turned = first * cosine
    turned -= second * sine
    second *= cosine
    second += first * sine
    first[...] = turned


def _default(rope: Rope, length: int) -> Frequencies:
    exponents = np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims
    return 1.0 / rope.theta**exponents


def _linear(rope: Rope, length: int) -> Frequencies:
    return _default(rope, length) / rope.factor


def _dynamic(rope: Rope, length: int) -> Frequencies:
    length = max(length, rope.max_length)
    stretch = rope.factor * length / rope.max_length - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.dims / (rope.dims - 2))
    return _default(replace(rope, theta=theta), length)


def _llama3(rope: Rope, length: int) -> Frequencies:
    plain = _default(rope, length)
    slow = float(rope.parameters.get("low_freq_factor", 1.0))
    fast = float(rope.parameters.get("high_freq_factor", 4.0))
    turns = rope.original_length * plain / (2 * math.pi)
    kept = np.clip((turns - slow) / ((fast - slow) or 1e-9), 0.0, 1.0)  # Llama 4 has no ramp
    return kept * plain + (1 - kept) * plain / rope.factor


def _yarn(rope: Rope, length: int) -> Frequencies:
    def channel(turns: float) -> float:
        wavelength = rope.original_length / (turns * 2 * math.pi)
        return rope.dims * math.log(wavelength) / (2 * math.log(rope.theta))

    low = channel(rope.parameters.get("beta_fast", 32.0))
    high = channel(rope.parameters.get("beta_slow", 1.0))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    width = high - low if high != low else 0.001
    ramp = (np.arange(rope.dims // 2, dtype=np.float64) - low) / width
    plain, stretched = _default(rope, length), np.clip(ramp, 0.0, 1.0)
    return plain * (1 - stretched) + plain / rope.factor * stretched


def _longrope(rope: Rope, length: int) -> Frequencies:
    which = "long_factor" if length > rope.original_length else "short_factor"
    return _default(rope, length) / np.asarray(rope.parameters[which], dtype=np.float64)


KINDS: dict[str, Callable[[Rope, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def not_known(what: str, known: Iterable[str]) -> InputError:
    """The error for a word of config.json that the forward does not know."""
    return InputError(
        f"{what}; known are {', '.join(sorted(known))}",
        hint="bring activations with --activations, which works for any model",
    )


# mrope turns parts of a head by a token's time, row and column, which are one for tokens of text.
_POSITIVE = {
    "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
}  # fmt: skip
_REAL = {"mscale", "mscale_all_dim"}
_ALIASES = {"su": "longrope", "none": "default", "mrope": "default"}


def read_rope(
    given: Mapping[str, Any],
    head_dim: int,
    max_length: int,
    original_length: int | None,
    interleaved: bool = False,
) -> Rope:
    """The rope of one block from config.json's `rope_parameters` (or `rope_scaling`).

    original_length: `original_max_position_embeddings` where it stands outside `given`.
    interleaved: as of `Rope`
    Raises InputError for a kind that is not known and for keys that are missing.
    """
    parameters = {key: value for key, value in given.items() if value is not None}
    parameters["truncate"] = given.get("truncate", True)  # null is false
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in KINDS:
        raise not_known(f"config.json asks for rotary embeddings of type {kind!r}", KINDS)
    original = original_length or parameters.get("original_max_position_embeddings") or max_length
    _check_numbers({**parameters, "original_max_position_embeddings": original}, kind)
    dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if dims < 2 or dims % 2 or dims > head_dim:
        raise InputError(
            f"config.json turns {dims} channels of a head of {head_dim}; it must be even and not 0"
        )
    if kind in ("linear", "dynamic", "llama3") and "factor" not in parameters:
        raise InputError(f"config.json asks for {kind!r} rotary embeddings without a `factor`")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        _check_list(parameters, name, dims // 2)
    factor = float(parameters.get("factor", max_length / original))
    amplitude = _amplitude(kind, parameters, factor, original)
    theta = float(parameters["rope_theta"])
    return Rope(dims, theta, kind, factor, max_length, original, amplitude, parameters, interleaved)


def _check_numbers(parameters: Mapping[str, Any], kind: str) -> None:
    """Refuse what is no number, or not one that frequencies can be made of."""
    for key in _POSITIVE & parameters.keys():
        positive(parameters, key, {})
    for key in _REAL & parameters.keys():
        real(parameters, key, {})
    theta, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    if kind == "yarn" and theta <= 1:  # its logarithm is divided by
        raise InputError(f"config.json's rope_theta is {theta}; yarn needs more than 1")
    if kind == "longrope" and original <= 1:
        raise InputError(
            f"config.json's original_max_position_embeddings is {original}; longrope needs more"
            " than 1"
        )


def _check_list(parameters: Mapping[str, Any], name: str, count: int) -> None:
    """Refuse what is no list of `count` positive numbers."""
    found = parameters.get(name, [])
    if not isinstance(found, list):
        raise InputError(f"config.json's {name} is {found!r}; a list of {count} is needed")
    if len(found) != count:
        raise InputError(f"config.json's {name} has {len(found)} numbers and needs {count}")
    for value in found:
        positive({name: value}, name, {})


def _amplitude(kind: str, parameters: Mapping[str, Any], factor: float, original: int) -> float:
    if kind in ("yarn", "longrope") and "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    if kind not in ("yarn", "longrope") or factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor)


def _mscale(factor: float, scale: float = 1.0) -> float:
    """yarn's scale of cos and sin for positions stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1
