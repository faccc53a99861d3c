"""What transformers makes of an output, alone or with GPTQModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptq_cli.core.layer import Layer
from ptq_cli.core.names import natural
from ptq_cli.formats import common, fused, small_floats
from ptq_cli.formats.declared import entries, left_dense
from ptq_cli.formats.runtimes.artifact import (
    FAILS,
    LIMIT,
    NOTE,
    Artifact,
    Fact,
    Facts,
    about,
    asymmetric_experts,
    routers,
    tied_heads,
    undivided,
)


def in_blocks(dense: Sequence[str]) -> list[str]:
    return [module for module in dense if any(part.isdigit() for part in module.split("."))]


def _mixed(layers: Sequence[Layer]) -> list[str]:
    base = fused.scheme(fused.commonest(layers))
    return [layer.module for layer in layers if fused.scheme(layer) != base]


def gptqmodel_kernels(artifact: Artifact) -> Facts:
    """GPTQModel 7.6 on a CPU, by itself or under transformers."""
    layers, awq = artifact.layers, artifact.format == "awq"
    yield from undivided(layers, ": it raises")
    backend = 'AwqConfig(backend="torch_awq")' if awq else "backend gptq_torch"
    declared = artifact.declared.get("backend") in ("gptq_torch", "torch_awq")
    yield from about(
        (layer.module for layer in layers if common.outside_cpu_kernel(layer)),
        NOTE if declared else LIMIT,
        "the default CPU kernel for 4 bits has groups of 32, 64, 128, 256 and out_features in"
        " multiples of 16, and raises at the first forward",
        f"{backend} computes them{', as the config asks' if declared else ''}",
    )
    if any(layer.grid.bits == 4 for layer in layers) and not declared:
        text = "the default CPU kernel computes 4 bits in bfloat16"
        yield Fact(NOTE, text, hint=f"{backend} computes them exactly")


def mlx(artifact: Artifact) -> Facts:
    yield Fact(FAILS, "transformers reads MLX layouts on Apple's GPUs only")


def gptq(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs optimum 2.3 and gptqmodel 7.6 beside transformers")
    yield from _without_experts(artifact)
    text = "has another grid than most layers: transformers knows one, only GPTQModel.load more"
    yield from about(_mixed(artifact.layers), FAILS, text)
    text = "transformers never quantizes lm_head"
    yield from about(artifact.heads, FAILS, text, "use GPTQModel.load")
    key = "modules_in_block_to_quantize"
    endings = _strings_within(artifact.declared.get(key))
    if not endings:
        text = f"is dense, but {key} is missing: it would be noise"
        yield from about(in_blocks(artifact.dense_linears), FAILS, text)
    else:
        packed = [layer.module for layer in artifact.layers if not common.is_head(layer)]
        lost = [m for m in packed if not artifact.name_in_tree(m).endswith(endings)]
        yield from about(lost, FAILS, f"is packed, but not in {key} by its name in transformers")
        left = [m for m in artifact.dense_linears if artifact.name_in_tree(m).endswith(endings)]
        yield from about(left, FAILS, f"is dense, but in {key} by its name in transformers")
    yield from gptqmodel_kernels(artifact)


def _strings_within(value: Any) -> tuple[str, ...]:
    """The strings of a list, and those of the lists in it."""
    if isinstance(value, str):
        return (value,)
    return (
        tuple(x for part in value for x in _strings_within(part)) if isinstance(value, list) else ()
    )


def _without_experts(artifact: Artifact) -> Facts:
    yield from routers(artifact)
    text = f"is an expert, which transformers 5 has in no layer that reads {artifact.format}"
    hint = "--format compressed-tensors"
    yield from about((layer.module for layer in artifact.experts), FAILS, text, hint)


def awq(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs gptqmodel 7.6 beside transformers")
    yield from _without_experts(artifact)
    yield from _not_converted(artifact)
    yield from about(artifact.heads, FAILS, "AWQ loaders leave lm_head dense")
    yield from gptqmodel_kernels(artifact)


def _not_converted(artifact: Artifact) -> Facts:
    """What `modules_to_not_convert` leaves dense, and what it should."""
    key = "modules_to_not_convert"
    named = common.strings(artifact.declared, key, "quantization_config")
    kept = {name for name, _ in left_dense(map(artifact.name_in_tree, artifact.dense), named)}
    left = [m for m in artifact.dense_linears if artifact.name_in_tree(m) not in kept]
    text = f"is dense, but not in {key} by its name in transformers: it would be noise"
    yield from about((m for m in left if not m.endswith(common.HEADS)), FAILS, text)
    packed = {artifact.name_in_tree(layer.module): layer.module for layer in artifact.layers}
    lost = [packed[name] for name, _ in left_dense(packed, named)]
    yield from about(lost, FAILS, f"is packed, but {key} leaves it dense")


def fp8(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs accelerate beside transformers, and the model's own dtype")
    text = "without a GPU, FP8 is dequantized when it is loaded, and inputs are not rounded"
    yield Fact(LIMIT, text)
    yield from routers(artifact)
    yield from _not_converted(artifact)
    uneven = [
        layer.module
        for layer in artifact.layers
        if layer.shape[0] > layer.grid.block_rows > 1 and layer.shape[0] % layer.grid.block_rows
    ]
    text = "out_features is no multiple of the block: without a GPU, scales go to the wrong rows"
    yield from about(uneven, FAILS, text, "--format compressed-tensors")


def compressed(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs compressed-tensors 0.18 or later (proven: 0.20) beside transformers")
    yield from routers(artifact)
    yield from undeclared(artifact)
    yield from tied_heads(artifact, FAILS, "transformers raises")
    yield from _fused_experts(artifact)
    yield from undivided(artifact.layers)
    layers = artifact.layers
    narrow = [
        layer.module
        for layer in layers
        if layer.activation is not None and layer.activation.levels == "integer"
        if layer.grid.bits != 8
    ]
    text = "inputs rounded to integers were tried with weights of 8 bits only"
    yield from about(narrow, LIMIT, text)
    asymmetric = [
        layer.module for layer in layers if layer.activation is None and not layer.grid.sym
    ]
    dequantized = artifact.declared.get("dequantize") is True and not _mixed(layers)
    yield from _in_bfloat16(artifact, dequantized)
    if dequantized:
        text = "is asymmetric and therefore dequantized when loaded, to the model's dtype"
        yield from about(asymmetric, LIMIT, text)
        return
    text = (
        "is asymmetric, which compressed-tensors 0.18 to 0.20 loads only with"
        ' "dequantize": true and one scheme for all layers'
    )
    yield from about(asymmetric, FAILS, text, "--sym")
    if artifact.tree.own_class:
        text = (
            "is of a class that computes with `weight` itself, which loads only with"
            ' "dequantize": true and one scheme for all layers'
        )
        packed = (layer.module for layer in layers if layer.activation is None)
        yield from about(packed, FAILS, text)


def _in_bfloat16(artifact: Artifact, dequantized: bool) -> Facts:
    """FP4 and MX, which compressed-tensors unpacks to bfloat16."""
    found = [x.module for x in artifact.layers if small_floats.unpacked_to_bfloat16(x.grid)]
    if dequantized:
        text = "is dequantized when loaded, to the model's dtype"
        yield from about(found, LIMIT, text)
    elif common.model_dtype(artifact.config) == "BF16":
        text = "is unpacked to bfloat16: other dtypes than the model's own raise"
        yield from about(found, NOTE, text)
    else:
        text = (
            "is unpacked to bfloat16, and the model has another dtype, which loads only with"
            ' "dequantize": true and one scheme for all layers'
        )
        yield from about(found, FAILS, text)


def _fused_experts(artifact: Artifact) -> Facts:
    """transformers fuses experts in floating point, from packed symmetric weights of one scheme."""
    fused, layers = set(artifact.fused), artifact.layers
    dense = fused.intersection(artifact.dense)
    text = "is dense, an expert that transformers fuses: it raises"
    yield from about(sorted(dense, key=natural), FAILS, text, "quantize every expert")
    text = "has another grid than most layers, which transformers takes for all experts"
    yield from about((m for m in _mixed(layers) if m in fused), FAILS, text)
    experts = [layer for layer in layers if layer.module in fused]
    integers = [x for x in experts if x.activation and x.activation.levels == "integer"]
    plain = [layer.module for layer in integers if layer.grid.bits == 8]
    text = "is an expert of plain int8, which transformers cannot fuse: it raises"
    yield from about(plain, FAILS, text, "vLLM reads it")
    yield from asymmetric_experts(artifact)
    yield from _fused_floats(experts)


def _fused_floats(experts: Sequence[Layer]) -> Facts:
    floats = [layer for layer in experts if not layer.grid.integers]
    text = "is an expert in NVFP4, which transformers fuses without its global scale: noise"
    divided = [layer.module for layer in floats if layer.grid.scale_dtype == "e4m3"]
    yield from about(divided, FAILS, text, "vLLM reads it")
    shared = [
        layer.module
        for layer in floats
        if small_floats.is_block(layer.grid) or small_floats.numbers(layer.grid) == "MXFP8"
    ]
    text = "is an expert whose rows have several FP8 scales, which transformers cannot fuse"
    yield from about(shared, FAILS, text, "vLLM reads it")
    text = "is an expert, which transformers fuses in floating point: its inputs are not rounded"
    rounded = (layer.module for layer in experts if layer.activation is not None)
    yield from about(rounded, LIMIT, text)


def undeclared(artifact: Artifact) -> Facts:
    """Dense linears that the loader takes for quantized ones, and the reverse, by their names in
    the runtime."""
    config, where = artifact.declared, "quantization_config"
    ignore = dict.fromkeys(common.strings(config, "ignore", where))
    regular = any(entry.startswith("re:") for entry in ignore)
    if regular and not artifact.tree.renames:
        return  # names in the tree are not known for sure, and patterns may be written for them
    packed = {artifact.name_in_tree(layer.module): layer.module for layer in artifact.layers}
    dense = {artifact.name_in_tree(module): module for module in artifact.dense_linears}
    groups = common.mapping(config, "config_groups", where).values()
    targets = [
        target
        for group in groups
        if isinstance(group, Mapping)
        for target in common.strings(group, "targets", where)
    ]
    left = entries([*packed, *dense], ignore, f"{where}: ignore")
    aimed = entries([*packed, *dense], dict.fromkeys(targets), f"{where}: targets")
    noise = [module for name, module in dense.items() if left[name] is None and aimed[name]]
    yield from about(noise, FAILS, "is dense, but not in ignore: it would be noise")
    lost = [m for name, m in packed.items() if left[name] is not None or aimed[name] is None]
    yield from about(lost, FAILS, "is packed, but by its name in the runtime it is left dense")


def gguf(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs gguf and accelerate; from_pretrained(folder, gguf_file='model.gguf')")
    yield Fact(LIMIT, "transformers dequantizes a GGUF file when it loads it: no memory is saved")
    biases = [key for key in ("attention_bias", "mlp_bias") if artifact.config.get(key)]
    if biases:
        text = f"GGUF does not tell transformers of {' and '.join(biases)}: it drops the biases"
        yield Fact(FAILS, text, hint="pass config=AutoConfig.from_pretrained(folder) as well")
