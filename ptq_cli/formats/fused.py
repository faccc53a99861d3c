"""Linears that runtimes make one matrix of, and what those must have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.errors import InputError
from ptq_cli.formats import common

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
BEFORE_OTHERS = tuple(name for fused in FUSED for name in fused[:-1])  # in the one matrix
_EXPERT = ("w1", "w3")  # gate and up of an expert, where they are called so


def check_fused(layers: Sequence[Layer], dense: Sequence[str] = ()) -> None:
    """Runtimes fuse q/k/v and gate/up into one matrix: their grids must be the same.

    dense: modules left in floating point; vLLM refuses a matrix that is quantized in part

    Raises:
        InputError: two of them differ, or one is dense; both are named.
    """
    schemes: dict[str, tuple[Grid, Activation | None] | None] = {
        layer.module: scheme(layer) for layer in layers
    }
    schemes |= dict.fromkeys(dense)
    first: dict[tuple[str, tuple[str, ...]], str] = {}
    for module, own in schemes.items():
        parent, _, name = module.rpartition(".")
        for fused in FUSED:
            other = first.setdefault((parent, fused), module) if name in fused else module
            if schemes[other] != own:
                raise InputError(
                    f"{other} {_said(schemes[other])} and {module} {_said(own)}, but runtimes"
                    " (vLLM) fuse the two",
                    hint="give them the same scheme, bits, group size and symmetry, or quantize"
                    " neither",
                )


def fused_groups(modules: Iterable[str]) -> list[list[str]]:
    """Modules that runtimes fuse into one matrix together, every other one alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for module in modules:
        parent, _, name = module.rpartition(".")
        fused = next((own for own in (*FUSED, _EXPERT) if name in own), (name,))
        groups.setdefault((parent, *fused), []).append(module)
    return list(groups.values())


def _said(own: tuple[Grid, Activation | None] | None) -> str:
    if own is None:
        return "is left dense"
    grid, activation = own
    inputs = "" if activation is None else f" with {activation.bits}-bit inputs"
    if grid.integers:
        return f"has {grid.bits} bits, group_size {grid.group_size}, sym {grid.sym}{inputs}"
    rows = f" × {grid.block_rows} rows" if grid.block_rows > 1 else ""
    return f"has {common.NUMBERS[grid.levels]}, group_size {grid.group_size}{rows}{inputs}"


def scheme(layer: Layer) -> tuple[Grid, Activation | None]:
    """What a runtime must know of a layer: its grid, but for what it need not be told, and how its
    inputs are rounded. Layers with equal schemes share one declaration."""
    grid = replace(layer.grid, narrow_range=False, mirrored=False, global_scale=1.0)
    if grid.scale_dtype in common.SCALE_WORDS:
        grid = replace(grid, scale_dtype="float32")
    return grid, layer.activation


def commonest(layers: Sequence[Layer]) -> Layer:
    """A layer with the scheme that most layers have (the first such)."""
    counted = Counter(scheme(layer) for layer in layers)
    return max(layers, key=lambda layer: counted[scheme(layer)])
