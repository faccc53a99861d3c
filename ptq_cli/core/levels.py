"""Levels that are no integers: what a code of 4 or 8 bits means where levels are a table.

A code of a small float is sign, exponent and mantissa, as IEEE has them, the subnormal ones
included; neither has an infinity. (OCP Microscaling Formats v1.0; E4M3 as in arXiv 2209.05433.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SmallFloat:
    """A float of `bits` bits: `(−1)^sign · 2^(exponent − bias) · 1.mantissa`.

    largest: the greatest finite value; what is greater is clipped to it
    """

    bits: int
    mantissa_bits: int
    bias: int
    largest: float

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """What each code means, float32 [2^bits]; NaN where it means nothing."""
        codes = np.arange(2**self.bits)
        mantissa = codes % 2**self.mantissa_bits / 2**self.mantissa_bits
        exponent = codes % 2 ** (self.bits - 1) >> self.mantissa_bits
        size = np.where(
            exponent == 0,
            np.ldexp(mantissa, 1 - self.bias),
            np.ldexp(1 + mantissa, exponent - self.bias),
        )
        size[size > self.largest] = np.nan
        signed = np.where(codes < 2 ** (self.bits - 1), size, -size)
        return np.asarray(signed, np.float32)


SMALL_FLOATS = {
    "e2m1": SmallFloat(bits=4, mantissa_bits=1, bias=1, largest=6.0),
    "e4m3": SmallFloat(bits=8, mantissa_bits=3, bias=7, largest=448.0),
}

# ggml's IQ4_NL: 16 levels, closer to each other near zero, and no two sides alike.
IQ4_NL: NDArray[np.float32] = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)

# What each code means.
TABLES: dict[str, NDArray[np.float32]] = {
    **{name: small.values for name, small in SMALL_FLOATS.items()},
    "iq4_nl": IQ4_NL,
}
