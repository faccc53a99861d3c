"""What runtimes load, from files alone: facts about an output, each with its reason.

Proven by running the clients (tests/interop): transformers 5.23 with GPTQModel 7.6,
compressed-tensors 0.20 and gguf 0.19; mlx-lm 0.32. Facts about vLLM come from its source, those
about llama.cpp from runs of llama-cpp-python 0.3.36; neither is part of the tests here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq_cli.core.layer import Layer
from ptq_cli.core.names import fold_names, natural
from ptq_cli.errors import InputError
from ptq_cli.formats import common

FAILS, LIMIT, NOTE = "fails", "limit", "note"


@dataclass(frozen=True)
class Fact:
    """level: "fails" (does not load, or loads and computes noise), "limit" (a kernel's), "note".
    hint: what helps."""

    level: str
    text: str
    modules: tuple[str, ...] = ()
    hint: str | None = None

    @property
    def said(self) -> str:
        """The text and the layers it is about."""
        return f"{fold_names(self.modules)}: {self.text}" if self.modules else self.text

    def __str__(self) -> str:
        return f"{self.said}; {self.hint}" if self.hint else self.said


@dataclass(frozen=True)
class Artifact:
    """What is known of an output from its files. `dense`: linears left in floating point;
    `files`: names in its folder; `fused`: experts that runtimes fuse when they load them."""

    format: str
    layers: Sequence[Layer]
    dense: Sequence[str]
    config: Mapping[str, Any]
    files: Sequence[str]
    fused: Sequence[str] = ()

    @property
    def declared(self) -> Mapping[str, Any]:
        return common.mapping(self.config, "quantization_config", "config.json")


Facts = Iterator[Fact]


def facts(artifact: Artifact, runtime: str) -> list[Fact]:
    """All facts, the worst first. Raises InputError for an unknown runtime."""
    if runtime not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime!r}", hint=f"known: {', '.join(RUNTIMES)}")
    found, loaders = list(_model(artifact, runtime)), RUNTIMES[runtime]
    if artifact.format in loaders:
        found += loaders[artifact.format](artifact)
    else:
        text = f"{runtime} does not read format {artifact.format}"
        found.append(Fact(FAILS, text, hint=f"ptq pack --format {next(iter(loaders))}"))
    return sorted(found, key=lambda fact: (FAILS, LIMIT, NOTE).index(fact.level))


def loads(found: Iterable[Fact]) -> bool:
    return not any(fact.level == FAILS for fact in found)


def _about(modules: Iterable[str], level: str, text: str, hint: str | None = None) -> Facts:
    """A fact about those modules, if there are any."""
    found = tuple(modules)
    if found:
        yield Fact(level, text, found, hint)


def _model(artifact: Artifact, runtime: str) -> Facts:
    if artifact.format == "gguf":
        return
    if not artifact.config.get("model_type"):
        text = "config.json with a model_type is missing"
        yield Fact(FAILS, text, hint="quantize the model's folder")
    if runtime == "mlx" and "tokenizer.json" not in artifact.files:
        yield Fact(FAILS, "mlx_lm.load wants a tokenizer in the folder, and there is none")


def _undivided(layers: Iterable[Layer], then: str = "") -> Facts:
    sized = [layer for layer in layers if layer.grid.group_size > 0]
    short = [layer.module for layer in sized if layer.shape[1] % layer.grid.group_size]
    yield from _about(short, FAILS, f"in_features is no multiple of the group size{then}")


def _heads(layers: Iterable[Layer]) -> list[str]:
    return [layer.module for layer in layers if common.is_head(layer)]


def _in_blocks(dense: Sequence[str]) -> list[str]:
    return [module for module in dense if any(part.isdigit() for part in module.split("."))]


def _mixed(layers: Sequence[Layer]) -> list[str]:
    base = common.scheme(common.commonest(layers))
    return [layer.module for layer in layers if common.scheme(layer) != base]


def _gptqmodel_kernels(artifact: Artifact) -> Facts:
    """GPTQModel 7.6 on a CPU, by itself or under transformers."""
    layers, awq = artifact.layers, artifact.format == "awq"
    yield from _undivided(layers, ": it raises")
    backend = 'AwqConfig(backend="torch_awq")' if awq else "backend gptq_torch"
    declared = artifact.declared.get("backend") in ("gptq_torch", "torch_awq")
    yield from _about(
        (layer.module for layer in layers if common.outside_cpu_kernel(layer)),
        NOTE if declared else LIMIT,
        "the default CPU kernel for 4 bits has groups of 32, 64, 128, 256 and out_features in"
        " multiples of 16, and raises at the first forward",
        f"{backend} computes them{', as the config asks' if declared else ''}",
    )
    if any(layer.grid.bits == 4 for layer in layers) and not declared:
        text = "the default CPU kernel computes 4 bits in bfloat16"
        yield Fact(NOTE, text, hint=f"{backend} computes them exactly")


def _transformers_mlx(artifact: Artifact) -> Facts:
    yield Fact(FAILS, "transformers reads MLX layouts on Apple's GPUs only")


def _transformers_gptq(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs optimum 2.3 and gptqmodel 7.6 beside transformers")
    text = "has another grid than most layers: transformers knows one, only GPTQModel.load more"
    yield from _about(_mixed(artifact.layers), FAILS, text)
    text = "transformers never quantizes lm_head"
    yield from _about(_heads(artifact.layers), FAILS, text, "use GPTQModel.load")
    if not artifact.declared.get("modules_in_block_to_quantize"):
        text = "is dense, but modules_in_block_to_quantize is missing: it would be noise"
        yield from _about(_in_blocks(artifact.dense), FAILS, text)
    yield from _gptqmodel_kernels(artifact)


def _transformers_awq(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs gptqmodel 7.6 beside transformers")
    named = common.strings(artifact.declared, "modules_to_not_convert", "quantization_config")
    left = [module for module in _in_blocks(artifact.dense) if not module.endswith(named)]
    text = "is dense, but not in modules_to_not_convert under its full name: it would be noise"
    yield from _about(left, FAILS, text)
    yield from _about(_heads(artifact.layers), FAILS, "AWQ loaders leave lm_head dense")
    yield from _gptqmodel_kernels(artifact)


def _transformers_compressed(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs compressed-tensors 0.18 or later (proven: 0.20) beside transformers")
    yield from _undeclared(artifact)
    yield from _fused_experts(artifact)
    yield from _undivided(artifact.layers)
    layers = artifact.layers
    narrow = [
        layer.module for layer in layers if layer.activation is not None and layer.grid.bits != 8
    ]
    yield from _about(narrow, LIMIT, "rounded inputs were tried with weights of 8 bits only")
    asymmetric = [
        layer.module for layer in layers if layer.activation is None and not layer.grid.sym
    ]
    if artifact.declared.get("dequantize") and not _mixed(layers):
        text = "is asymmetric and therefore dequantized when loaded, to the model's dtype"
        yield from _about(asymmetric, LIMIT, text)
    else:
        text = (
            "is asymmetric, which compressed-tensors 0.18 to 0.20 loads only with"
            ' "dequantize": true and one scheme for all layers'
        )
        yield from _about(asymmetric, FAILS, text, "--sym")


def _fused_experts(artifact: Artifact) -> Facts:
    """transformers fuses experts in floating point, from packed symmetric weights of one scheme."""
    fused, layers = set(artifact.fused), artifact.layers
    dense = fused.intersection(artifact.dense)
    text = "is dense, an expert that transformers fuses: it raises"
    yield from _about(sorted(dense, key=natural), FAILS, text, "quantize every expert")
    text = "has another grid than most layers, which transformers takes for all experts"
    yield from _about((m for m in _mixed(layers) if m in fused), FAILS, text)
    experts = [layer for layer in layers if layer.module in fused]
    plain = [x.module for x in experts if x.activation is not None and x.grid.bits == 8]
    text = "is an expert of plain int8, which transformers cannot fuse: it raises"
    yield from _about(plain, FAILS, text, "vLLM reads it")
    yield from _asymmetric_experts(artifact)


def _asymmetric_experts(artifact: Artifact) -> Facts:
    fused = set(artifact.fused)
    asymmetric = [x.module for x in artifact.layers if x.module in fused and not x.grid.sym]
    text = "is an asymmetric expert, which is fused without its zero points: it would be noise"
    yield from _about(asymmetric, FAILS, text, "--sym")


def _undeclared(artifact: Artifact) -> Facts:
    ignore = common.strings(artifact.declared, "ignore", "quantization_config")
    if not any(entry.startswith("re:") for entry in ignore):
        left = (module for module in artifact.dense if module not in ignore)
        yield from _about(left, FAILS, "is dense, but not in ignore: it would be noise")


def _transformers_gguf(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs gguf and accelerate; from_pretrained(folder, gguf_file='model.gguf')")
    yield Fact(LIMIT, "transformers dequantizes a GGUF file when it loads it: no memory is saved")
    biases = [key for key in ("attention_bias", "mlp_bias") if artifact.config.get(key)]
    if biases:
        text = f"GGUF does not tell transformers of {' and '.join(biases)}: it drops the biases"
        yield Fact(FAILS, text, hint="pass config=AutoConfig.from_pretrained(folder) as well")


def _vllm(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "from vLLM's source, not run here")
    layers = artifact.layers
    yield from _undivided(layers, ": it raises")
    if artifact.format == "gptq_v2":
        yield Fact(LIMIT, "gptq_v2 needs a vLLM that knows checkpoint_format; others misread it")
    if artifact.format != "compressed-tensors":
        yield from _about(_heads(layers), LIMIT, "only some versions read a quantized lm_head")
        return
    yield from _undeclared(artifact)
    yield from _asymmetric_experts(artifact)
    rounded = [layer for layer in layers if layer.activation is not None]
    asymmetric = [layer.module for layer in rounded if not layer.grid.sym]
    yield from _about(asymmetric, FAILS, "W8A8 weights must be symmetric")
    odd = [layer.module for layer in rounded if layer.grid.bits not in (4, 8)]
    text = "no kernel for weights of this width with rounded inputs"
    yield from _about(odd, FAILS, text, "--bits 8")
    narrow = [layer.module for layer in rounded if layer.grid.bits == 4]
    text = "W4A8 needs a recent version, and hardware that it has kernels for"
    yield from _about(narrow, LIMIT, text)
    unrounded = [
        layer for layer in layers if layer.activation is None and layer.grid.bits not in (4, 8)
    ]
    asymmetric = [layer.module for layer in unrounded if not layer.grid.sym]
    yield from _about(asymmetric, FAILS, "asymmetric weights have 4 or 8 bits")
    odd = [layer.module for layer in unrounded]
    yield from _about(odd, LIMIT, "widths other than 4 and 8 bits need a recent version")


def _llama_cpp(artifact: Artifact) -> Facts:
    yield Fact(LIMIT, "llama.cpp rounds the inputs of quantized matrices to 8 bits (error ~ 1e-2)")
    yield Fact(NOTE, "run with llama-cpp-python 0.3.36; not part of the tests here")


def _mlx(artifact: Artifact) -> Facts:
    if artifact.format == "awq":
        other = [
            layer.module for layer in artifact.layers if layer.grid.group_size not in (32, 64, 128)
        ]
        yield from _about(other, FAILS, "mlx has groups of 32, 64 and 128 only")
    elif artifact.format != "mlx":
        yield Fact(FAILS, "mlx-lm refuses every g_idx tensor", hint="ptq pack --format mlx")
    if common.rope_of_old(artifact.config):
        text = "mlx-lm 0.32 does not read rope_parameters"
        yield Fact(FAILS, text, hint="ptq pack --format mlx")
    if common.model_dtype(artifact.config) != "F32":
        text = "on a CPU mlx accumulates in the model's dtype"
        yield Fact(NOTE, text, hint="set_dtype(float32) helps")


def _gptqmodel(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "proven: gptqmodel 7.6.0 with torch 2.13")
    meta = common.mapping(artifact.declared, "meta", "quantization_config")
    if artifact.format == "gptq" and "quantizer" not in meta:
        asymmetric = [layer.module for layer in artifact.layers if not layer.grid.sym]
        text = "GPTQModel refuses sym: false in layout gptq"
        yield from _about(asymmetric, FAILS, text, "--format gptq_v2")
    if artifact.format != "awq" and not artifact.declared.get("dynamic"):
        text = "is dense, but `dynamic` does not say so"
        yield from _about(_in_blocks(artifact.dense), FAILS, text)
    yield from _gptqmodel_kernels(artifact)


# What each runtime reads, the format to choose for it first.
RUNTIMES: dict[str, dict[str, Callable[[Artifact], Facts]]] = {
    "transformers": {
        "compressed-tensors": _transformers_compressed,
        **dict.fromkeys(("gptq", "gptq_v2"), _transformers_gptq),
        "awq": _transformers_awq,
        "gguf": _transformers_gguf,
        "mlx": _transformers_mlx,
    },
    "vllm": dict.fromkeys(("compressed-tensors", "gptq", "gptq_v2", "awq"), _vllm),
    "llama.cpp": {"gguf": _llama_cpp},
    "mlx": dict.fromkeys(("mlx", "awq", "gptq", "gptq_v2"), _mlx),
    "gptqmodel": dict.fromkeys(("gptq", "gptq_v2", "awq"), _gptqmodel),
}
