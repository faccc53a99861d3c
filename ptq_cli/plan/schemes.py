"""Schemes: the field's short words for the numbers of weights and inputs, and what each stands for.

A scheme of small floats is one thing: its bits, groups and scales cannot be chosen apart. The
others are short for settings, each of which may be said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptq_cli.core.grid import Activation
from ptq_cli.errors import InputError
from ptq_cli.plan.mixes import is_mix


@dataclass(frozen=True)
class Scheme:
    """What a scheme stands for.

    help: in a line
    settings: what it is short for, by the names of settings
    grid: what it says of grids that no setting does
    inputs: how the layers' inputs are rounded when they run, or None
    """

    help: str
    settings: Mapping[str, Any]
    grid: Mapping[str, Any] = field(default_factory=dict)
    inputs: Activation | None = None

    @property
    def fixed(self) -> bool:
        """Whether its settings cannot be said otherwise."""
        return bool(self.grid)


def _small_floats(bits: int, group_size: int) -> dict[str, Any]:
    return {
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "narrow_range": False,
        "format": "compressed-tensors",
    }


EXAMPLE = "ffn_down=Q6_K"  # of --tensor-type

_FP8_INPUTS = Activation(levels="e4m3")
_FP8 = {"levels": "e4m3"}
_NVFP4 = {"levels": "e2m1", "scale_dtype": "e4m3"}
_MXFP4 = {"levels": "e2m1", "scale_dtype": "e8m0"}
_MXFP8 = {"levels": "e4m3", "scale_dtype": "e8m0"}
_INT4 = {"bits": 4, "group_size": 128, "sym": True}

SCHEMES = {
    "W4A16": Scheme(
        "4 bits in groups of 128",
        {**_INT4, "activation_scheme": "none"},
    ),
    "W8A8": Scheme(
        "int8 weights per channel, int8 inputs per token",
        {"bits": 8, "group_size": -1, "sym": True, "narrow_range": True},
        inputs=Activation(),
    ),
    "FP8_DYNAMIC": Scheme(
        "FP8 weights per channel, FP8 inputs per token", _small_floats(8, -1), _FP8, _FP8_INPUTS
    ),
    "FP8": Scheme(
        "FP8 weights and inputs, one scale each, known beforehand",
        _small_floats(8, 0),
        _FP8,
        Activation(levels="e4m3", dynamic=False, per_token=False),
    ),
    "FP8_BLOCK": Scheme(
        "FP8 weights in blocks of 128 × 128, FP8 inputs in groups of 128",
        _small_floats(8, 128),
        {**_FP8, "block_rows": 128},
        Activation(levels="e4m3", group_size=128),
    ),
    "NVFP4": Scheme(
        "FP4 weights and inputs in groups of 16 with FP8 scales",
        _small_floats(4, 16),
        _NVFP4,
        Activation(4, levels="e2m1", group_size=16, scale_dtype="e4m3"),
    ),
    "NVFP4A16": Scheme("the same, weights only", _small_floats(4, 16), _NVFP4),
    "MXFP4": Scheme(
        "FP4 weights and inputs in groups of 32 with scales that are powers of two",
        _small_floats(4, 32),
        _MXFP4,
        Activation(4, levels="e2m1", group_size=32, scale_dtype="e8m0"),
    ),
    "MXFP4A16": Scheme("the same, weights only", _small_floats(4, 32), _MXFP4),
    "MXFP8": Scheme(
        "FP8 weights and inputs in groups of 32 with scales that are powers of two",
        _small_floats(8, 32),
        _MXFP8,
        Activation(levels="e4m3", group_size=32, scale_dtype="e8m0"),
    ),
    "MXFP8A16": Scheme("the same, weights only", _small_floats(8, 32), _MXFP8),
    "W4AFP8": Scheme(
        "4 bits in groups of 128, FP8 inputs per token",
        {**_INT4, "format": "compressed-tensors"},
        inputs=_FP8_INPUTS,
    ),
}


def scheme_settings(name: str) -> dict[str, Any]:
    """The settings that a scheme is short for; none of "", which is no scheme."""
    if is_mix(name):
        return {"format": "gguf"}
    return dict(SCHEMES[name].settings) if name in SCHEMES else {}


def scheme_grid(name: str) -> dict[str, Any]:
    """What a scheme says of grids that no setting does."""
    return dict(SCHEMES[name].grid) if name in SCHEMES else {}


def scheme_inputs(name: str) -> Activation | None:
    """How inputs are rounded under a scheme."""
    return SCHEMES[name].inputs if name in SCHEMES else None


def says_inputs(name: str) -> bool:
    """Whether a scheme says how inputs are rounded in a way that no settings could: those of small
    floats, or weights of small floats alone, or of GGUF's types."""
    if is_mix(name):
        return True
    inputs = scheme_inputs(name)
    small = inputs is not None and inputs.levels != "integer"
    return small or (name in SCHEMES and SCHEMES[name].fixed)


def check_fixed(name: str, values: Mapping[str, Any]) -> None:
    """Refuse settings of a grid that a scheme of small floats does not have.

    values: of a tensor's grid, by the names of settings

    Raises:
        InputError: the first of them, with what the scheme has.
    """
    if name not in SCHEMES or not SCHEMES[name].fixed:
        return
    own = SCHEMES[name].settings
    for key, value in values.items():
        if key in own and value != own[key]:
            word = key.replace("_", "-")
            option = "asym" if (key, value) == ("sym", False) else word
            raise InputError(
                f"{name} has {word} {_said(own[key])}, not {_said(value)}",
                hint=f"leave --{option} out, or --scheme",
            )
    wanted = values.get("scale_dtype", "auto")
    if "scale_dtype" in SCHEMES[name].grid and wanted != "auto":
        raise InputError(
            f"{name} has scales of its own, not {wanted}", hint="leave --scale-dtype out"
        )


def check_alone(scheme: str, given: Mapping[str, Any]) -> None:
    """Refuse settings of a grid beside a mix, which says the numbers of every tensor.

    given: settings by name, None and () are "not given"

    Raises:
        InputError: the first of them.
    """
    for key in ("bits", "group_size", "sym", "narrow_range", "scale_dtype"):
        if is_mix(scheme) and given.get(key) is not None:
            word = "asym" if (key, given[key]) == ("sym", False) else key.replace("_", "-")
            raise InputError(
                f"--{word} has no place beside {scheme}, which says the numbers of every tensor",
                hint=f"leave it out, or --scheme; --tensor-type {EXAMPLE} changes single tensors",
            )


def _said(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
