"""The declaration of compressed-tensors layers in config.json, written and read.

Loaders want every key below: without `quantization_status: compressed` or with a dense linear
missing from `ignore` they load and compute noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import AS_NAMED, Contents, ModuleTree
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.formats.declared import entries
from ptq_cli.numerics.packing import words_width

_PACKED, _PLAIN = "pack-quantized", "int-quantized"
_WHERE = "quantization_config"
_KNOWN = (
    "quant_method", "format", "quantization_status", "config_groups", "ignore", "version",
    "global_compression_ratio", "sparsity_config", "dequantize", "kv_cache_scheme",
)  # fmt: skip
_SCHEME_KEYS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
)  # fmt: skip
_OLD_ODD_BITS = (3, 5, 6, 7)  # their streams changed in version 0.18
_Scheme = tuple[Grid, Activation | None]


def declare(
    layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree = AS_NAMED
) -> dict[str, Any]:
    """`quantization_config`: one group per scheme. The commonest aims at the class Linear, the
    others, which win over it, at modules by name."""
    common.check_fused(layers, dense)
    base = common.scheme(common.commonest(layers))
    members: dict[tuple[Any, ...], list[Layer]] = {base: []}
    for layer in layers:
        members.setdefault(common.scheme(layer), []).append(layer)
    groups = {}
    for number, (scheme, own) in enumerate(members.items()):
        named = [name for layer in own for name in tree.names(layer.module)]
        targets = ["Linear"] if scheme == base else named
        groups[f"group_{number}"] = {"targets": targets, **_group(own[0])}
    formats = {group["format"] for group in groups.values()}
    left = [name for module in dense for name in tree.names(module)]
    # a head that is tied has no tensor of its own, but has to be named
    tied = not any(module.endswith("lm_head") for module in dense)
    tied = tied and not any(map(common.is_head, layers))
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*left, "lm_head"] if tied else left,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    only = layers[0]
    if len(members) == 1 and only.activation is None and (tree.own_class or not only.grid.sym):
        # transformers with compressed-tensors 0.18 to 0.20 loads packed zeros, and linears of a
        # class that has no use for packed weights, only in this way
        config["dequantize"] = True
    return config


def _group(layer: Layer) -> dict[str, Any]:
    grid, activation = layer.grid, layer.activation
    size = grid.group_size
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.sym, "dynamic": False}
    weights["strategy"] = "group" if size > 0 else "channel" if size < 0 else "tensor"
    if size > 0:
        weights["group_size"] = size
    inputs = None
    if activation is not None:
        inputs = {
            "num_bits": activation.bits,
            "type": "int",
            "symmetric": activation.sym,
            "strategy": "token" if activation.dynamic else "tensor",
            "dynamic": activation.dynamic,
        }
    return {
        "format": _PLAIN if is_plain(grid.bits, activation) else _PACKED,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def is_plain(bits: int, activation: Activation | None) -> bool:
    """Whether codes are stored as plain int8 (`int-quantized`)."""
    return activation is not None and bits == 8


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
    targets: dict[str, _Scheme] = {}
    for name in groups:
        where, group = f"{_WHERE}, {name}", common.mapping(groups, name, _WHERE)
        scheme = _scheme(group, settings.get("format"), where)
        for target in common.strings(group, "targets", where):
            targets.setdefault(target, scheme)
    modules = common.modules_with(
        contents.specs, ".weight_scale", ".weight_packed", ".weight_shape",
        declared=f"{_WHERE} says compressed-tensors",
    )  # fmt: skip
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
    return tuple(layers)


def _scheme(group: Mapping[str, Any], stored: str | None, where: str) -> _Scheme:
    """How a group rounds weights and inputs; `stored`: the format where it states none."""
    common.refuse_unknown(group, ("targets", "format", "weights", "input_activations"), where)
    weights = common.mapping(group, "weights", where)
    common.refuse_unknown(weights, _SCHEME_KEYS, f"{where}, weights")
    bits = common.setting(weights, "num_bits", int, where)
    if weights.get("type", "int") != "int" or not 2 <= bits <= 8 or weights.get("dynamic"):
        kind = f"weights of type {weights.get('type')!r} with {bits} bits"
        raise InputError(f"{where}: {kind} are not read yet, only integers of 2 to 8 bits")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise InputError(
            f"{where}: actorder {weights['actorder']!r} is not understood: no current loader reads"
            " weight_g_idx"
        )
    activation = _activation(common.mapping(group, "input_activations", where), where)
    plain, own = is_plain(bits, activation), group.get("format") or stored
    wanted = _PLAIN if plain else _PACKED
    if own != wanted:
        raise InputError(f"{where}: format {own!r} is not understood here, only {wanted!r}")
    sym = common.setting(weights, "symmetric", bool, where, True)
    return Grid(bits, _group_size(weights, plain, where), sym), activation


def _group_size(weights: Mapping[str, Any], plain: bool, where: str) -> int:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if size is not None:
        size = common.setting(weights, "group_size", int, where)
    if strategy is None:
        strategy = "group" if size and size > 0 else "channel" if size == -1 else "tensor"
    if strategy == "group" and not plain and size and size > 0:
        return size
    if strategy == "channel" and size in (None, -1):
        return -1
    if strategy == "tensor" and plain and size is None:
        return 0
    raise InputError(f"{where}: strategy {strategy!r} with group_size {size} is not understood")


def _activation(inputs: Mapping[str, Any], where: str) -> Activation | None:
    if not inputs:
        return None
    common.refuse_unknown(inputs, _SCHEME_KEYS, f"{where}, input_activations")
    dynamic = common.setting(inputs, "dynamic", bool, where, False)
    strategy = inputs.get("strategy", "token" if dynamic else "tensor")
    bits = common.setting(inputs, "num_bits", int, where)
    plain = inputs.get("type", "int") == "int" and inputs.get("group_size") is None
    if not plain or bits != 8 or strategy != ("token" if dynamic else "tensor"):
        raise InputError(
            f"{where}: input_activations of type {inputs.get('type')!r}, {bits} bits, strategy"
            f" {strategy!r}, dynamic {dynamic} are not understood"
        )
    return Activation(bits, common.setting(inputs, "symmetric", bool, where, True), dynamic)


def _layer(module: str, grid: Grid, activation: Activation | None, contents: Contents) -> Layer:
    specs = contents.specs
    scales = common.tensor(specs, f"{module}.weight_scale", 1 if grid.group_size == 0 else 2)
    if grid.sym and f"{module}.weight_zero_point" in specs:
        raise InputError(f"module {module!r} has zero points, but {_WHERE} says symmetric")
    if is_plain(grid.bits, activation):
        rows, columns = common.tensor(specs, f"{module}.weight", 2).shape
    else:
        rows, columns = _packed_shape(module, grid.bits, contents)
    if grid.group_size > 0 and columns % grid.group_size:
        raise InputError(
            f"{_WHERE}: group_size {grid.group_size} does not divide in_features {columns} of"
            f" {module!r}"
        )
    grid = replace(grid, scale_dtype=common.scale_name(scales))
    layer = common.linear(module, (rows, columns), grid, contents.config)
    return common.perhaps_mirrored(replace(layer, activation=activation))


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
