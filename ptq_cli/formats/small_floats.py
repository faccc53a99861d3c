"""What layouts of FP8 and FP4 have in common: their bytes, their scales, and what is refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import ml_dtypes
import numpy as np

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import Contents
from ptq_cli.core.tensors import Array, Codes
from ptq_cli.errors import InputError
from ptq_cli.formats import common, fused

E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
_SIGN, _NAN = np.uint8(0x80), np.uint8(0x7F)  # of E4M3, whose NaN are 0x7F and 0xFF

# How inputs are rounded beside such weights.
FP8_TOKENS = Activation(8, levels="e4m3")
FP8_TENSOR = Activation(8, dynamic=False, per_token=False, levels="e4m3")
FP8_GROUPS = Activation(8, levels="e4m3", group_size=128)


def is_block(grid: Grid) -> bool:
    return grid.block_rows > 1


def unpacked_to_bfloat16(grid: Grid) -> bool:
    """Whether compressed-tensors makes bfloat16 of such weights, whatever the model's dtype."""
    return grid.scale_dtype in ("e8m0", "e4m3")


def numbers(grid: Grid) -> str:
    """What people call the numbers of a grid of small floats, or of ggml's types."""
    if grid.levels == "iq4_nl":
        return "IQ4_XS" if grid.multiples else "IQ4_NL"
    if grid.multiples:
        return f"Q{grid.bits}_K"
    if grid.scale_dtype in ("e8m0", "e4m3") and grid.block_rows == 1:
        return f"{'NV' if grid.scale_dtype == 'e4m3' else 'MX'}FP{grid.bits}"
    shared = {-1: "row", 0: "tensor"}.get(grid.group_size, "block" if is_block(grid) else "group")
    return f"FP{grid.bits} by {shared}"


def grid_misfit(layer: Layer, name: str, widths: dict[tuple[str, str], int]) -> Misfit | None:
    """Why a layout does not hold what shares a scale, for small floats.

    widths: the group size that goes with levels and a scale dtype; of others, rows, tensors and
        blocks of 128 × 128 share a scale
    """
    grid, columns = layer.grid, layer.shape[1]
    width = widths.get((grid.levels, grid.scale_dtype))
    said = f"{grid.levels} numbers with {grid.scale_dtype} scales"
    if width is not None and (grid.group_size, grid.block_rows) != (width, 1):
        return Misfit(f"{name} has groups of {width} columns for {said}, not {grid.group_size}")
    if width is None and grid.levels != "e4m3":
        return Misfit(f"{name} does not hold {said}")
    shared = (grid.group_size, grid.block_rows)
    if width is None and shared not in ((-1, 1), (0, 1), (128, 128)):
        return Misfit(
            f"{name} has one scale for a row, the tensor or 128 rows × 128 columns of FP8, not for"
            f" {grid.block_rows} × {grid.group_size}"
        )
    if grid.group_size > 0 and columns % grid.group_size:
        return Misfit(
            f"groups of {grid.group_size} columns do not divide in_features {columns}, as {name}"
            f" needs for {said}",
            "--scheme FP8_DYNAMIC",
        )
    return None


def same_inputs(activation: Activation | None, *held: Activation | None) -> bool:
    """Whether inputs are rounded in one of these ways; of a static scale for the tensor, and of
    scales in floating point, no more need be said."""
    return _essence(activation) in map(_essence, held)


def _essence(activation: Activation | None) -> tuple[object, ...]:
    if activation is None:
        return ()
    storage = activation.scale_dtype if activation.scale_dtype in ("e8m0", "e4m3") else "float"
    return (
        activation.bits, activation.levels, activation.dynamic, activation.group_size, storage,
        activation.per_token or not activation.dynamic,
    )  # fmt: skip


def is_pair(block: object) -> bool:
    """Whether config.json's word for a block is two numbers: its rows, its columns."""
    return isinstance(block, list) and [type(n) for n in block] == [int, int] and min(block) > 1


def refuse_without_scales(modules: Collection[str], contents: Contents, ending: str) -> None:
    """Raises InputError where a weight is FP8 and its module is none of `modules`."""
    known = set(modules)
    for name, spec in contents.specs.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and spec.dtype == "F8_E4M3" and module not in known:
            raise InputError(f"tensor {name!r} is F8_E4M3, but there is no '{module}.{ending}'")


def fp8_codes(name: str, stored: Array) -> Codes:
    """The bytes of a tensor of E4M3. Raises InputError where one of them is NaN."""
    codes: Codes = np.ascontiguousarray(stored).view(np.uint8)
    bad = (codes & _NAN) == _NAN
    if bad.any():
        first = [int(index) for index in np.argwhere(bad)[0]]
        raise InputError(
            f"tensor {name!r} holds NaN (byte 0x7F or 0xFF) at index {first}, {int(bad.sum())} in"
            " all"
        )
    return codes


def e8m0_scales(name: str, stored: Array) -> Array:
    """Scales that are bytes of exponents. Raises InputError where one of them is NaN (255)."""
    codes = np.ascontiguousarray(stored).view(np.uint8)
    if (codes == 0xFF).any():
        first = [int(index) for index in np.argwhere(codes == 0xFF)[0]]
        raise InputError(f"tensor {name!r} holds the exponent 255, NaN, at index {first}")
    return codes.view(E8M0)


def e4m3_scales(name: str, stored: Array) -> Array:
    """Scales in E4M3. Raises InputError where one of them is NaN or below zero."""
    codes = fp8_codes(name, stored)
    negative = codes > _SIGN
    if negative.any():
        first = [int(index) for index in np.argwhere(negative)[0]]
        raise InputError(f"tensor {name!r} holds a scale below zero at index {first}")
    return codes.view(E4M3)


def positive(name: str, stored: Array) -> float:
    """One number that scales or divides everything. Raises InputError unless it is a normal float32
    greater than zero, with room for what it scales or divides."""
    value = float(stored.reshape(-1)[0])
    if not 2.0**-110 < value < 2.0**110:
        raise InputError(f"tensor {name!r} is {value:g}; a finite number above 0 was expected")
    return value


def check_shared(modules: Sequence[str], ending: str, contents: Contents) -> None:
    """Linears that runtimes fuse have one global scale, `<module>.<ending>`, together.

    Raises:
        InputError: two of them differ; one is missing, or is no number above 0.
    """
    for group in fused.fused_groups(modules):
        names = [f"{module}.{ending}" for module in group]
        for name in names:
            common.tensor(contents.specs, name, 1)
        values = [positive(name, contents.read(name)) for name in names]
        for name, value in zip(names, values, strict=True):
            if value != values[0]:
                raise InputError(
                    f"{names[0]} is {values[0]:g} and {name} {value:g}, but runtimes (vLLM) fuse"
                    " the two under one"
                )


def one_number(name: str, value: float) -> Array:
    """As `positive`, float32 [1], to be written."""
    stored = np.array([value], np.float32)
    positive(name, stored)
    return stored


def no_zeros(layer: Layer) -> Codes:
    """The zeros of a layer without any, uint8 of the scales' shape."""
    return np.zeros(layer.grid.scales_shape(layer.shape), np.uint8)
