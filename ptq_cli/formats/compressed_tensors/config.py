"""The declaration of compressed-tensors layers in config.json, written and read.

Loaders want every key below: without `quantization_status: compressed` or with a dense linear
missing from `ignore` they load and compute noise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import AS_NAMED, Contents, ModuleTree
from ptq_cli.errors import InputError
from ptq_cli.formats import common, small_floats
from ptq_cli.formats.compressed_tensors.layouts import NVFP4, PLAIN, layout
from ptq_cli.formats.compressed_tensors.schemes import Scheme, group, read_scheme
from ptq_cli.formats.declared import entries
from ptq_cli.numerics.packing import words_width

_WHERE = "quantization_config"
_KNOWN = (
    "quant_method", "format", "quantization_status", "config_groups", "ignore", "version",
    "global_compression_ratio", "sparsity_config", "dequantize", "kv_cache_scheme",
)  # fmt: skip
_OLD_ODD_BITS = (3, 5, 6, 7)  # their streams changed in version 0.18


def declare(
    layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree = AS_NAMED
) -> dict[str, Any]:
    """`quantization_config`: one group per scheme. The commonest aims at the class Linear, the
    others, which win over it, at modules by name."""
    common.check_fused(layers, dense)
    base = common.scheme(common.commonest(layers))
    members: dict[Scheme, list[Layer]] = {base: []}
    for layer in layers:
        members.setdefault(common.scheme(layer), []).append(layer)
    groups = {}
    for number, (scheme, own) in enumerate(members.items()):
        named = [name for layer in own for name in tree.names(layer.module)]
        targets = ["Linear"] if scheme == base else named
        groups[f"group_{number}"] = {"targets": targets, **group(own[0])}
    formats = {group["format"] for group in groups.values()}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": common.left_dense_names(layers, dense, tree),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    if len(members) == 1 and base[1] is None and _loads_dequantized(layers[0], tree):
        config["dequantize"] = True
    return config


def _loads_dequantized(layer: Layer, tree: ModuleTree) -> bool:
    """Whether transformers with compressed-tensors 0.18 to 0.20 loads such layers only when it is
    asked to dequantize them: packed zeros; linears of a class that has no use for packed weights;
    and FP4 and MX, which it unpacks to bfloat16, in models of another dtype."""
    grid = layer.grid
    in_bfloat16 = small_floats.unpacked_to_bfloat16(grid)
    other = (layer.model_dtype or layer.dtype) != "BF16"
    return tree.own_class or not grid.sym or (in_bfloat16 and other)


def recognise(contents: Contents) -> tuple[Layer, ...]:
    """The layers that config.json declares and the headers show; () for another layout."""
    settings = common.mapping(contents.config, "quantization_config", "config.json")
    if settings.get("quant_method") != "compressed-tensors":
        return ()
    common.refuse_unknown(settings, _KNOWN, _WHERE)
    sparsity = common.mapping(settings, "sparsity_config", _WHERE)
    if sparsity.get("format", "dense") != "dense":
        raise InputError(f"{_WHERE}: sparsity_config {sparsity['format']!r} is not understood")
    if settings.get("quantization_status") != "compressed":
        status = settings.get("quantization_status")
        raise InputError(f"{_WHERE}: quantization_status is {status!r}, not 'compressed'")
    groups = common.mapping(settings, "config_groups", _WHERE)
    if not groups:
        raise InputError(f"{_WHERE}: config_groups is missing")
    targets: dict[str, Scheme] = {}
    for name in groups:
        where, declared = f"{_WHERE}, {name}", common.mapping(groups, name, _WHERE)
        scheme = read_scheme(declared, settings.get("format"), where)
        for target in common.strings(declared, "targets", where):
            targets.setdefault(target, scheme)
    modules = common.modules_with(
        contents.specs, ".weight_scale", ".weight_packed", ".weight_shape",
        declared=f"{_WHERE} says compressed-tensors",
    )  # fmt: skip
    small_floats.refuse_without_scales(modules, contents, "weight_scale")
    ignore = dict.fromkeys(common.strings(settings, "ignore", _WHERE))
    ignored = entries(modules, ignore, f"{_WHERE}: ignore")
    layers = []
    for module, named in entries(modules, targets, f"{_WHERE}: targets").items():
        left = ignored[module]
        if left is not None:
            raise InputError(f"module {module!r} is packed, but {left!r} in ignore leaves it dense")
        if named is None:
            raise InputError(f"module {module!r} is packed, but no group of {_WHERE} names it")
        layers.append(_layer(module, *targets[named], contents))
    common.check_fused(layers)
    divided = [layer.module for layer in layers if layout(layer.grid, layer.activation) == NVFP4]
    small_floats.check_shared(divided, "weight_global_scale", contents)
    return tuple(layers)


def _layer(module: str, grid: Grid, activation: Activation | None, contents: Contents) -> Layer:
    specs = contents.specs
    scales = common.tensor(specs, f"{module}.weight_scale", 1 if grid.group_size == 0 else 2)
    if grid.sym and f"{module}.weight_zero_point" in specs:
        raise InputError(f"module {module!r} has zero points, but {_WHERE} says symmetric")
    rows, columns = _shape(module, grid, activation, contents)
    if grid.group_size > 0 and columns % grid.group_size:
        raise InputError(
            f"{_WHERE}: group_size {grid.group_size} does not divide in_features {columns} of"
            f" {module!r}"
        )
    if grid.scale_dtype in common.SCALE_WORDS:
        grid = replace(grid, scale_dtype=common.scale_name(scales))
    layer = replace(
        common.linear(module, (rows, columns), grid, contents.config), activation=activation
    )
    return layer if grid.small_float else common.perhaps_mirrored(layer)


def _shape(
    module: str, grid: Grid, activation: Activation | None, contents: Contents
) -> tuple[int, int]:
    """Rows and columns of the weight, from what is stored."""
    if grid.levels == "e4m3" or layout(grid, activation) == PLAIN:
        rows, columns = common.tensor(contents.specs, f"{module}.weight", 2).shape
    elif grid.levels == "e2m1":
        rows, half = common.tensor(contents.specs, f"{module}.weight_packed", 2).shape
        columns = 2 * half
    else:
        rows, columns = _packed_shape(module, grid.bits, contents)
    return rows, columns


def _packed_shape(module: str, bits: int, contents: Contents) -> tuple[int, int]:
    name, specs = f"{module}.weight_packed", contents.specs
    if f"{module}.weight" in specs:
        raise InputError(f"module {module!r} has both 'weight' and 'weight_packed'")
    found = common.tensor(specs, name, 2).shape
    if common.tensor(specs, f"{module}.weight_shape", 1).shape != (2,):
        raise InputError(f"tensor '{module}.weight_shape' is not a pair")
    rows, columns = (int(size) for size in contents.read(f"{module}.weight_shape"))
    if bits in _OLD_ODD_BITS and not _dense_stream(name, (rows, columns), bits, contents):
        raise InputError(
            f"tensor {name!r}: {bits}-bit codes as compressed-tensors before 0.18 packed them are"
            " not understood",
            hint="save it again with compressed-tensors 0.18 or later",
        )
    if found != (rows, words_width(columns, bits)):
        raise InputError(
            f"tensor {name!r} is {list(found)}; {rows} × {columns} codes of {bits} bits ask for"
            f" {[rows, words_width(columns, bits)]}"
        )
    return rows, columns


def _dense_stream(name: str, shape: tuple[int, int], bits: int, contents: Contents) -> bool:
    """Whether odd widths are packed as since 0.18, without unused bits: by the stated version, else
    by a width that only one of the two has, else by a bit that the older way never sets."""
    settings = contents.config["quantization_config"]
    stated = re.match(r"(\d+)\.(\d+)", str(settings.get("version") or ""))
    if stated is not None:
        return (int(stated[1]), int(stated[2])) >= (0, 18)
    per_word = 32 // bits
    padded = (shape[0], -(-shape[1] // per_word))
    if shape[1] <= per_word or contents.specs[name].shape != padded:
        return True
    unused = np.uint32(2**32 - 2 ** (bits * per_word))
    return bool((contents.read(name).view(np.uint32) & unused).any())
