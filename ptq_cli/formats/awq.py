"""AWQ as AutoAWQ's GEMM kernels read it: 4 bits, packed along the outputs in a shuffled order.

Per linear `<module>`, with out_features N, in_features K, n_groups G = K / group_size:

    <module>.qweight  I32 [K, N / 8]  row k: eight outputs per word
    <module>.qzeros   I32 [G, N / 8]  zeros, packed alike (nothing subtracted)
    <module>.scales   F16 [G, N]

Nibble i (bits 4i … 4i + 3) of word c belongs to output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
`weight ≈ scales · (codes − zeros)`. Symmetric grids store zeros of 8, of 7 where a group is
mirrored: loaders want qzeros always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import AS_NAMED, Contents, Format, ModuleTree
from ptq_cli.core.tensors import Array, Codes, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common, fused
from ptq_cli.formats.declared import left_dense
from ptq_cli.numerics.packing import pack_words

_LIMITS = common.Limits(bits=(4,))
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_KNOWN = (
    "quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert",
    "backend", "format", "checkpoint_format", "do_fuse", "fuse_max_seq_len",
    "modules_to_fuse", "exllama_config", "meta", "desc_act", "sym", "lm_head", "pack_dtype",
    "true_sequential", "damp_percent", "module_inclusion",
)  # fmt: skip


def _misfit(layer: Layer) -> Misfit | None:
    if found := common.misfit(layer, "awq", _LIMITS):
        return found
    if layer.shape[0] % 8:
        reason = f"awq holds out_features in multiples of 8, not {layer.shape[0]}"
        return Misfit(reason, "--format compressed-tensors")
    if common.is_head(layer):
        return Misfit("awq loaders leave lm_head dense", f"--ignore {layer.module}")
    return None


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    (rows, columns), module = layer.shape, layer.module
    groups = layer.grid.n_groups(columns)
    word = common.SCALE_WORDS[layer.grid.scale_dtype]
    return (
        TensorSpec(f"{module}.qweight", "I32", (columns, rows // 8)),
        TensorSpec(f"{module}.qzeros", "I32", (groups, rows // 8)),
        TensorSpec(f"{module}.scales", word, (groups, rows)),
    )


def _encode(layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    module = layer.module
    zeros = common.integer_zeros(layer, rounded)
    return {
        f"{module}.qweight": _pack(rounded.codes.T),
        f"{module}.qzeros": _pack(zeros.T),
        f"{module}.scales": np.ascontiguousarray(rounded.scales.T),
    }


def _pack(codes: Codes) -> NDArray[np.int32]:
    """Columns of each eight put in storage order, then packed as any 4-bit stream."""
    eights = codes.reshape(codes.shape[0], -1, 8)[:, :, _ORDER]
    return pack_words(eights.reshape(codes.shape), 4).view(np.int32)


def _decode(layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    module = layer.module
    zeros = _unpack(tensors[f"{module}.qzeros"])
    return common.positive_scales(
        QuantizedWeight(
            codes=np.ascontiguousarray(_unpack(tensors[f"{module}.qweight"]).T),
            scales=np.ascontiguousarray(tensors[f"{module}.scales"].T),
            zeros=np.ascontiguousarray(zeros.T),
            grid=layer.grid,
        )
    )


def _unpack(words: Array) -> Codes:
    """Nibble by nibble to the column it belongs to."""
    codes = np.empty((words.shape[0], words.shape[1] * 8), np.uint8)
    for place, column in enumerate(_ORDER):
        codes[:, column::8] = words >> (4 * place) & 15
    return codes


def _config(
    layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree = AS_NAMED
) -> dict[str, Any]:
    fused.check_fused(layers, dense)
    dense = [name for module in dense for name in tree.names(module)]
    sizes = {layer.grid.group_size for layer in layers}
    if len(sizes) > 1:
        raise InputError(
            f"awq has one group size for all layers, not {sorted(sizes)}",
            hint="--format compressed-tensors",
        )
    for module, entry in left_dense((layer.module for layer in layers), dense):
        raise InputError(f"awq cannot leave {entry} dense without {module} too")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop() if sizes else 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(dense) or None,
    }


def _layers(contents: Contents) -> tuple[Layer, ...]:
    settings = common.mapping(contents.config, "quantization_config", "config.json")
    if settings.get("quant_method") != "awq":
        return ()
    where = "quantization_config"
    common.refuse_unknown(settings, _KNOWN, where)
    for key in ("version", "format", "checkpoint_format"):
        if str(settings.get(key) or "gemm").lower() != "gemm":
            raise InputError(f"{where}: AWQ {key} {settings[key]!r} is not understood, only 'gemm'")
    if common.setting(settings, "bits", int, where, 4) != 4:
        raise InputError(f"{where}: AWQ with {settings['bits']} bits is not understood, only 4")
    if settings.get("desc_act"):
        raise InputError(f"{where}: desc_act is true, but AWQ has no g_idx")
    modules = common.modules_with(
        contents.specs, ".qweight", ".qzeros", declared=f"{where} says awq"
    )
    entries = common.strings(settings, "modules_to_not_convert", where)
    for module, entry in left_dense(modules, entries):
        raise InputError(f"module {module!r} is packed, but {entry!r} says it is left dense")
    return tuple(_layer(module, contents) for module in modules)


def _layer(module: str, contents: Contents) -> Layer:
    config, specs = contents.config, contents.specs
    settings, where = config["quantization_config"], "quantization_config"
    for stray in ("weight", "g_idx"):
        if f"{module}.{stray}" in specs:
            raise InputError(f"module {module!r} has both 'qweight' and {stray!r}")
    scales = common.tensor(specs, f"{module}.scales", 2)
    columns = common.tensor(specs, f"{module}.qweight", 2).shape[0]
    size = common.setting(settings, "group_size", int, where, 128)
    if size == 0 or size < -1 or (size > 0 and columns % size):
        raise InputError(f"{where}: group_size {size} does not divide in_features of {module!r}")
    grid = Grid(4, size, sym=False, scale_dtype=common.scale_name(scales))
    layer = common.linear(module, (scales.shape[1], columns), grid, config)
    common.check_specs(specs, _specs(layer), where)
    zeros = _unpack(contents.read(f"{module}.qzeros"))
    if np.isin(zeros, (grid.mid_code - 1, grid.mid_code)).all():
        layer = common.perhaps_mirrored(replace(layer, grid=replace(grid, sym=True)))
    if (zeros != grid.mid_code).any() and not common.setting(
        settings, "zero_point", bool, where, True
    ):
        raise InputError(
            f"tensor '{module}.qzeros' has zeros other than 8, but zero_point is false"
        )
    return layer


FORMAT = Format(
    name="awq",
    help="AutoAWQ GEMM, 4 bits: transformers, GPTQModel, vLLM, mlx-lm.",
    misfit=_misfit,
    specs=_specs,
    encode=_encode,
    decode=_decode,
    config=_config,
    layers=_layers,
    mirrored=common.may_mirror,
    file_metadata={"format": "pt"},
    model_config=common.rope_of_old,
)
