"""Which settings a quantizing command has, and its own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.registry import SMOOTHERS, method, smoother


def settings_classes(command: str) -> tuple[type[Any], ...]:
    """The settings of the grid, then those of the command's method; a smoother can be followed by
    GPTQ and has its settings too."""
    if command in SMOOTHERS:
        return GridSettings, smoother(command).settings, method("gptq").settings
    return GridSettings, method("rtn" if command == "pack" else command).settings


def default_settings(command: str) -> Mapping[str, Any]:
    """Defaults that are not the fields' own."""
    if command == "pack":
        return {"mse": False}
    return smoother(command).defaults if command in SMOOTHERS else {}


def may_stay_float(command: str) -> bool:
    """Whether its `bits` may be 16: smoothed weights, and nothing rounded."""
    return command in SMOOTHERS and smoother(command).floats
