"""How a group of config.json declares weights and inputs, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.formats.compressed_tensors.layouts import PLAIN, layout, read_as
from ptq_cli.formats.small_floats import FP8_TENSOR, FP8_TOKENS, is_pair

Scheme = tuple[Grid, Activation | None]
_KEYS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic",
    "actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
)  # fmt: skip
_SCALE_DTYPES = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}
_READ = {word.removeprefix("torch."): name for name, word in _SCALE_DTYPES.items()}
_FLOATS = {4: "e2m1", 8: "e4m3"}


def group(layer: Layer) -> dict[str, Any]:
    """The declaration of a layer, but for its targets."""
    activation = layer.activation
    return {
        "format": layout(layer.grid, activation),
        "weights": _weights(layer.grid),
        "input_activations": None if activation is None else _inputs(activation),
        "output_activations": None,
    }


def _weights(grid: Grid) -> dict[str, Any]:
    size = grid.group_size
    said = {
        "num_bits": grid.bits,
        "type": "int" if grid.integers else "float",
        "symmetric": grid.sym,
        "dynamic": False,
    }
    if grid.block_rows > 1:
        return said | {"strategy": "block", "block_structure": [grid.block_rows, size]}
    if size <= 0:
        return said | {"strategy": "channel" if size < 0 else "tensor"}
    return said | _groups(size, grid.scale_dtype)


def _groups(size: int, scale_dtype: str) -> dict[str, Any]:
    strategy = "tensor_group" if scale_dtype == "e4m3" else "group"
    said: dict[str, Any] = {"strategy": strategy, "group_size": size}
    if scale_dtype in _SCALE_DTYPES:
        said["scale_dtype"] = _SCALE_DTYPES[scale_dtype]
    return said


def _inputs(activation: Activation) -> dict[str, Any]:
    said: dict[str, Any] = {
        "num_bits": activation.bits,
        "type": "int" if activation.levels == "integer" else "float",
        "symmetric": activation.sym,
    }
    if activation.group_size:
        local = activation.scale_dtype == "e4m3"
        said |= _groups(activation.group_size, activation.scale_dtype)
        return said | {"dynamic": "local" if local else True}
    strategy = "token" if activation.dynamic else "tensor"
    return said | {"strategy": strategy, "dynamic": activation.dynamic}


def read_scheme(declared: Mapping[str, Any], stored: str | None, where: str) -> Scheme:
    """How a group rounds weights and inputs; `stored`: the format where it states none. Scales in
    floating point are "float32" for now: their tensors say in what they are stored.

    Raises:
        InputError: something in it is not understood.
    """
    common.refuse_unknown(declared, ("targets", "format", "weights", "input_activations"), where)
    weights = common.mapping(declared, "weights", where)
    common.refuse_unknown(weights, _KEYS, f"{where}, weights")
    bits = common.setting(weights, "num_bits", int, where)
    kind, integer = weights.get("type", "int"), weights.get("type", "int") == "int"
    known = 2 <= bits <= 8 if integer else kind == "float" and bits in _FLOATS
    if not known or weights.get("dynamic"):
        raise InputError(
            f"{where}: weights of type {kind!r} with {bits} bits are not understood, only integers"
            " of 2 to 8 bits and floats of 4 and 8"
        )
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise InputError(
            f"{where}: actorder {weights['actorder']!r} is not understood: no current loader reads"
            " weight_g_idx"
        )
    activation = _read_inputs(common.mapping(declared, "input_activations", where), where)
    sym = common.setting(weights, "symmetric", bool, where, True)
    grid = _integers(weights, bits, sym, activation, where) if integer else _floats(weights, where)
    own, readable = declared.get("format") or stored, read_as(grid, activation)
    if own not in readable:
        raise InputError(f"{where}: format {own!r} is not understood here, only {readable[0]!r}")
    return grid, activation


def _integers(
    weights: Mapping[str, Any], bits: int, sym: bool, activation: Activation | None, where: str
) -> Grid:
    plain = layout(Grid(bits), activation) == PLAIN
    strategy, size = weights.get("strategy"), _size(weights, where)
    if weights.get("block_structure"):
        raise InputError(f"{where}: block_structure of integers is not understood")
    if strategy is None:
        strategy = "group" if size and size > 0 else "channel" if size == -1 else "tensor"
    if strategy == "group" and not plain and size and size > 0:
        return Grid(bits, size, sym)
    if strategy == "channel" and size in (None, -1):
        return Grid(bits, -1, sym)
    if strategy == "tensor" and plain and size is None:
        return Grid(bits, 0, sym)
    raise InputError(f"{where}: strategy {strategy!r} with group_size {size} is not understood")


def _floats(weights: Mapping[str, Any], where: str) -> Grid:
    """The grid of weights that are floats of 4 or 8 bits."""
    bits, strategy, size = weights["num_bits"], weights.get("strategy"), _size(weights, where)
    block = weights.get("block_structure")
    word = str(weights.get("scale_dtype") or "").removeprefix("torch.")
    scales = _READ.get(word, "float32")
    grid = Grid(bits, -1, levels=_FLOATS[bits], scale_dtype=scales)
    if not common.setting(weights, "symmetric", bool, where, True):
        raise InputError(f"{where}: floats of {bits} bits that are not symmetric")
    if (bits, strategy, size) == (4, "tensor_group", 16) and word in ("", "float8_e4m3fn"):
        return Grid(4, 16, levels="e2m1", scale_dtype="e4m3")
    if strategy == "group" and size == 32 and (scales == "e8m0" or (bits, word) == (4, "")):
        return Grid(bits, 32, levels=_FLOATS[bits], scale_dtype="e8m0")
    if bits == 8 and scales == "float32":
        if strategy == "channel" and size in (None, -1):
            return grid
        if strategy in ("tensor", None) and size is None and block is None:
            return Grid(bits, 0, levels="e4m3", scale_dtype="float32")
        if strategy == "block" and block is not None and is_pair(block):
            return Grid(8, block[1], levels="e4m3", block_rows=block[0], scale_dtype="float32")
    raise InputError(
        f"{where}: floats of {bits} bits with strategy {strategy!r}, group_size {size},"
        f" block_structure {block} and scale_dtype {word or None!r} are not understood"
    )


def _size(settings: Mapping[str, Any], where: str) -> int | None:
    if settings.get("group_size") is None:
        return None
    return common.setting(settings, "group_size", int, where)


def _read_inputs(inputs: Mapping[str, Any], where: str) -> Activation | None:
    if not inputs:
        return None
    common.refuse_unknown(inputs, _KEYS, f"{where}, input_activations")
    bits = common.setting(inputs, "num_bits", int, where)
    dynamic, size = inputs.get("dynamic", False), _size(inputs, where)
    if type(dynamic) is not bool and dynamic != "local":
        raise InputError(f"{where}: dynamic is {dynamic!r}, true, false or 'local' was expected")
    strategy = inputs.get("strategy", "token" if dynamic else "tensor")
    word = str(inputs.get("scale_dtype") or "").removeprefix("torch.")
    kind = inputs.get("type", "int")
    sym = common.setting(inputs, "symmetric", bool, where, True)
    if size is None and strategy == ("token" if dynamic else "tensor") and bits == 8:
        if kind == "int":
            return Activation(8, sym, bool(dynamic))
        if kind == "float" and sym:
            return FP8_TOKENS if dynamic else FP8_TENSOR
    if kind == "float" and sym and size is not None and bits in _FLOATS:
        levels, own = _FLOATS[bits], (bits, strategy, dynamic, size)
        if own == (4, "tensor_group", "local", 16):
            return Activation(4, levels=levels, group_size=16, scale_dtype="e4m3")
        if strategy == "group" and dynamic is True and size == 32 and _READ.get(word) == "e8m0":
            return Activation(bits, levels=levels, group_size=32, scale_dtype="e8m0")
        if own == (8, "group", True, 128) and not word:
            return Activation(8, levels=levels, group_size=128)
    raise InputError(
        f"{where}: input_activations of type {kind!r}, {bits} bits, strategy {strategy!r}, dynamic"
        f" {dynamic}, group_size {size} are not understood"
    )
