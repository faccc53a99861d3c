"""GPTQ as AutoGPTQ, GPTQModel, transformers and vLLM read it: 2, 3, 4, 8 bits, act-order included.

Per linear `<module>`, with out_features N, in_features K, n_groups G:

    <module>.qweight  I32 [K · bits / 32, N]  column n: the codes of row n as one stream of words
    <module>.qzeros   I32 [G, N · bits / 32]  row g: the zeros of group g as one stream of words
    <module>.scales   F16 [G, N]
    <module>.g_idx    I32 [K]                 group of each column, trivial order included

`weight ≈ scales · (codes − zeros)`. Kernels for symmetric grids (Marlin, ExLlama) read no zeros, so
a mirrored group is `max − code` with a negative scale and the zero of all. Two versions differ in
qzeros only: v1 (`gptq`) stores zeros minus one, v2 (`gptq_v2`) stores zeros. A zero of 0 has no
portable v1 form (some loaders add one to whole words, so that it carries into its neighbour, some
to fields), hence v1 is written for symmetric grids only. A v1 field of all ones is refused when
read: nobody can say what it stood for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.patterns import ForeignPatterns
from ptq_cli.core.plugins import AS_NAMED, Contents, Format, ModuleTree
from ptq_cli.core.tensors import Array, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.formats import common, fused
from ptq_cli.numerics.packing import pack_words, unpack_words

_LIMITS = common.Limits(bits=(2, 3, 4, 8), reordered=True)
# Keys of quantization_config: the first two lines say what the tensors mean, the others how they
# were made or are run.
_KNOWN = (
    "quant_method", "method", "bits", "group_size", "desc_act", "sym", "checkpoint_format",
    "format", "lm_head", "dynamic", "pack_dtype",
    "true_sequential", "damp_percent", "damp_auto_increment", "static_groups", "meta", "mse",
    "model_name_or_path", "model_file_base_name", "model_seqlen", "max_input_length",
    "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id",
    "dataset", "tokenizer", "cache_block_outputs", "use_cuda_fp16", "use_exllama",
    "disable_exllama", "exllama_config", "backend", "act_group_aware",
    "modules_in_block_to_quantize",
)  # fmt: skip


def _misfit(name: str, layer: Layer) -> Misfit | None:
    if found := common.misfit(layer, name, _LIMITS):
        return found
    if name == "gptq" and not layer.grid.sym:
        return Misfit("gptq (v1) cannot hold a zero of 0", "--format gptq_v2 or --sym")
    for size, axis in zip(layer.shape, ("out_features", "in_features"), strict=True):
        if size * layer.grid.bits % 32:
            whole = 32 // np.gcd(32, layer.grid.bits)
            reason = f"{name} at {layer.grid.bits} bits holds {axis} in multiples of {whole}"
            return Misfit(f"{reason}, not {size}", "--format compressed-tensors")
    return None


def _specs(layer: Layer) -> tuple[TensorSpec, ...]:
    (rows, columns), bits, module = layer.shape, layer.grid.bits, layer.module
    groups = layer.grid.n_groups(columns)
    word = common.SCALE_WORDS[layer.grid.scale_dtype]
    return (
        TensorSpec(f"{module}.qweight", "I32", (columns * bits // 32, rows)),
        TensorSpec(f"{module}.qzeros", "I32", (groups, rows * bits // 32)),
        TensorSpec(f"{module}.scales", word, (groups, rows)),
        TensorSpec(f"{module}.g_idx", "I32", (columns,)),
    )


def _encode(name: str, layer: Layer, rounded: QuantizedWeight) -> dict[str, Array]:
    bits, module = layer.grid.bits, layer.module
    stored = common.signed_scales(layer, rounded)
    zeros = stored.zeros
    if name == "gptq":
        if not zeros.all():
            raise InputError(
                f"{module}: a zero is 0, which gptq (v1) cannot hold", hint="--format gptq_v2"
            )
        zeros = zeros - np.uint8(1)
    words = pack_words(stored.codes, bits)
    return {
        f"{module}.qweight": np.ascontiguousarray(words.T).view(np.int32),
        f"{module}.qzeros": pack_words(np.ascontiguousarray(zeros.T), bits).view(np.int32),
        f"{module}.scales": np.ascontiguousarray(stored.scales.T),
        f"{module}.g_idx": stored.column_groups().astype(np.int32),
    }


def _decode(name: str, layer: Layer, tensors: Mapping[str, Array]) -> QuantizedWeight:
    (rows, columns), bits, module = layer.shape, layer.grid.bits, layer.module
    zeros = unpack_words(tensors[f"{module}.qzeros"].view(np.uint32), bits, rows)
    if name == "gptq":
        if (zeros == layer.grid.max_code).any():
            raise InputError(
                f"tensor '{module}.qzeros' holds a zero that does not fit gptq (v1): loaders read"
                " it differently"
            )
        zeros += np.uint8(1)
    if layer.grid.sym and (zeros != layer.grid.mid_code).any():
        raise InputError(
            f"tensor '{module}.qzeros' holds zero points other than {layer.grid.mid_code}, but the"
            " configuration says symmetric"
        )
    return common.positive_scales(
        QuantizedWeight(
            codes=unpack_words(tensors[f"{module}.qweight"].T.view(np.uint32), bits, columns),
            scales=np.ascontiguousarray(tensors[f"{module}.scales"].T),
            zeros=np.ascontiguousarray(zeros.T),
            grid=layer.grid,
            g_idx=_order(layer, tensors[f"{module}.g_idx"]),
        )
    )


def _order(layer: Layer, g_idx: Array) -> Array | None:
    """The group of each column, or None where it is trivial.

    Raises:
        InputError: it names a group that is not there or holds more columns than a group has, or
            it is not trivial though the layer is declared to be.
    """
    grid, columns = layer.grid, layer.shape[1]
    if np.array_equal(g_idx, grid.g_idx(columns)):
        return None
    name = f"{layer.module}.g_idx"
    groups, width = grid.n_groups(columns), grid.width(columns)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise InputError(f"tensor {name!r} names groups outside 0 … {groups - 1}")
    if int(np.bincount(g_idx).max()) > width:
        raise InputError(f"tensor {name!r} puts more than {width} columns into a group")
    if not layer.reordered:
        raise InputError(f"tensor {name!r} reorders groups, but desc_act is false")
    return g_idx.astype(np.int32)


def _config(
    name: str, layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree = AS_NAMED
) -> dict[str, Any]:
    fused.check_fused(layers, dense)
    base = fused.commonest(layers)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": base.grid.bits,
        "group_size": base.grid.group_size,
        "desc_act": any(layer.reordered for layer in layers),
        "sym": base.grid.sym,
        "checkpoint_format": name,
        "lm_head": any(layer.module.endswith("lm_head") for layer in layers),
    }
    left = [module for module in dense if _in_block(module) != module]
    dynamic: dict[str, Any] = {
        f"-:^{re.escape(name)}$": {} for module in left for name in tree.names(module)
    }
    for layer in layers:
        if fused.scheme(layer) != fused.scheme(base):
            settings = {key: getattr(layer.grid, key) for key in ("bits", "group_size", "sym")}
            for name in tree.names(layer.module):
                dynamic[f"+:^{re.escape(name)}$"] = settings
    if dynamic:
        config["dynamic"] = dynamic
    if left:
        config["modules_in_block_to_quantize"] = [_quantized_suffixes(layers, left, tree)]
    if any(common.outside_cpu_kernel(layer) for layer in layers):
        config["backend"] = "gptq_torch"
    return config


def _in_block(module: str) -> str:
    """The module's name inside its block: what follows the first number."""
    return re.sub(r"^.*?\.\d+\.", "", module, count=1)


def _quantized_suffixes(
    layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree
) -> list[str]:
    """Names for transformers, which quantizes what ends in one of them: those inside a block where
    no dense module ends so too, else whole ones."""
    named: dict[str, None] = {}
    for layer in layers:
        suffix = _in_block(layer.module)
        shared = any(module.endswith(suffix) for module in dense)
        for name in tree.names(layer.module) if shared else (suffix,):
            named[name] = None
    return list(named)


def _layers(name: str, contents: Contents) -> tuple[Layer, ...]:
    settings = common.mapping(contents.config, "quantization_config", "config.json")
    if settings.get("quant_method", settings.get("method")) != "gptq":
        return ()
    stored = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if stored not in ("gptq", "gptq_v2"):
        raise InputError(f"quantization_config: GPTQ in the layout {stored!r} is not understood")
    if stored != name:
        return ()
    common.refuse_unknown(settings, _KNOWN, "quantization_config")
    if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise InputError(f"quantization_config: pack_dtype {settings['pack_dtype']!r}, not int32")
    modules = common.modules_with(
        contents.specs, ".qweight", ".qzeros", ".g_idx", declared="quantization_config says gptq"
    )
    dynamic = common.mapping(settings, "dynamic", "quantization_config")
    patterns = [re.sub(r"^[+-]:", "", pattern) for pattern in dynamic]
    overrides = ForeignPatterns(patterns, "quantization_config: dynamic")
    layers = []
    for module in modules:
        own: Mapping[str, Any] = {}
        place = overrides.first(module)
        if place is not None:  # the first pattern that matches decides
            pattern = list(dynamic)[place]
            if pattern.startswith("-:"):
                raise InputError(f"module {module!r} is packed, but {pattern!r} leaves it dense")
            own = common.mapping(dynamic, pattern, "dynamic")
            common.refuse_unknown(own, _KNOWN, f"dynamic {pattern!r}")
        layers.append(_layer(module, {**settings, **own}, contents))
    fused.check_fused(layers)
    return tuple(layers)


def _layer(module: str, own: Mapping[str, Any], contents: Contents) -> Layer:
    specs, where = contents.specs, f"quantization_config of {module}"
    if f"{module}.weight" in specs:
        raise InputError(f"module {module!r} has both 'weight' and 'qweight'")
    scales = common.tensor(specs, f"{module}.scales", 2)
    grid = Grid(
        bits=common.setting(own, "bits", int, where),
        group_size=common.setting(own, "group_size", int, where, 128),
        sym=common.setting(own, "sym", bool, where, True),
        scale_dtype=common.scale_name(scales),
    )
    if grid.bits not in _LIMITS.bits or not (grid.group_size > 0 or grid.group_size == -1):
        raise InputError(f"{where}: {grid.bits} bits, group_size {grid.group_size} is not GPTQ")
    shape = (scales.shape[1], common.tensor(specs, f"{module}.g_idx", 1).shape[0])
    if shape[0] * grid.bits % 32 or shape[1] * grid.bits % 32:
        raise InputError(f"{where}: {list(shape)} at {grid.bits} bits does not fill whole words")
    layer = common.perhaps_mirrored(common.linear(module, shape, grid, contents.config))
    layer = replace(layer, reordered=common.setting(own, "desc_act", bool, where, False))
    common.check_specs(specs, _specs(layer), f"quantization_config ({grid.bits} bits)")
    return replace(layer, reordered=_order(layer, contents.read(f"{module}.g_idx")) is not None)


def _record(name: str, text: str) -> Format:
    return Format(
        name=name,
        help=text,
        misfit=partial(_misfit, name),
        specs=_specs,
        encode=partial(_encode, name),
        decode=partial(_decode, name),
        config=partial(_config, name),
        layers=partial(_layers, name),
        mirrored=common.may_mirror,
        file_metadata={"format": "pt"},
        config_file="quantize_config.json",
    )


FORMAT = _record("gptq", "GPTQ (v1), symmetric: transformers, GPTQModel, vLLM.")
FORMAT_V2 = _record("gptq_v2", "GPTQ v2, asymmetric too: transformers, GPTQModel, vLLM.")
