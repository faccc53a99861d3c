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
from ptq_cli.core.names import fold_names
from ptq_cli.errors import InputError
from ptq_cli.formats import common

FAILS, LIMIT, NOTE = "fails", "limit", "note"
_MLX_GROUPS = (32, 64, 128)


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
    `files`: names in its folder."""

    format: str
    layers: Sequence[Layer]
    dense: Sequence[str]
    config: Mapping[str, Any]
    files: Sequence[str]

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


def _where(
    layers: Iterable[Layer],
    fails: Callable[[Layer], bool],
    level: str,
    text: str,
    hint: str | None = None,
) -> Facts:
    """A fact about those layers that it is true for, if any."""
    modules = tuple(layer.module for layer in layers if fails(layer))
    if modules:
        yield Fact(level, text, modules, hint)


def _model(artifact: Artifact, runtime: str) -> Facts:
    if artifact.format == "gguf":
        return
    if not artifact.config.get("model_type"):
        text = "config.json with a model_type is missing"
        yield Fact(FAILS, text, hint="quantize the model's folder")
    if runtime == "mlx" and "tokenizer.json" not in artifact.files:
        yield Fact(FAILS, "mlx_lm.load wants a tokenizer in the folder, and there is none")


def _undivided(layers: Iterable[Layer], then: str = "") -> Facts:
    def short(layer: Layer) -> bool:
        return layer.grid.group_size > 0 and layer.shape[1] % layer.grid.group_size != 0

    text = "in_features is no multiple of the group size"
    yield from _where(layers, short, FAILS, f"{text}: {then}" if then else text)


def _in_blocks(dense: Sequence[str]) -> list[str]:
    return [module for module in dense if any(part.isdigit() for part in module.split("."))]


def _mixed(layers: Sequence[Layer]) -> tuple[str, ...]:
    base = common.scheme(common.commonest(layers))
    return tuple(layer.module for layer in layers if common.scheme(layer) != base)


def _gptqmodel_kernels(artifact: Artifact) -> Facts:
    """GPTQModel 7.6 on a CPU, by itself or under transformers."""
    layers, awq = artifact.layers, artifact.format == "awq"
    yield from _undivided(layers, "it raises")
    backend = 'AwqConfig(backend="torch_awq")' if awq else "backend gptq_torch"
    declared = artifact.declared.get("backend") in ("gptq_torch", "torch_awq")
    yield from _where(
        layers,
        common.outside_cpu_kernel,
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
    mixed = _mixed(artifact.layers)
    if mixed:
        text = "has another grid than most layers: transformers knows one, only GPTQModel.load more"
        yield Fact(FAILS, text, mixed)
    text = "transformers never quantizes lm_head"
    yield from _where(artifact.layers, common.is_head, FAILS, text, "use GPTQModel.load")
    left = _in_blocks(artifact.dense)
    if left and not artifact.declared.get("modules_in_block_to_quantize"):
        text = "is dense, but modules_in_block_to_quantize is missing: it would be noise"
        yield Fact(FAILS, text, tuple(left))
    yield from _gptqmodel_kernels(artifact)


def _transformers_awq(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs gptqmodel 7.6 beside transformers")
    named = common.strings(artifact.declared, "modules_to_not_convert", "quantization_config")
    left = [m for m in _in_blocks(artifact.dense) if not any(m.endswith(n) for n in named)]
    if left:
        text = "is dense, but not in modules_to_not_convert under its full name: it would be noise"
        yield Fact(FAILS, text, tuple(left))
    yield from _where(artifact.layers, common.is_head, FAILS, "AWQ loaders leave lm_head dense")
    yield from _gptqmodel_kernels(artifact)


def _transformers_compressed(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs compressed-tensors 0.18 or later (proven: 0.20) beside transformers")
    yield from _undeclared(artifact)
    yield from _undivided(artifact.layers)
    yield from _where(
        artifact.layers,
        lambda x: x.activation is not None and x.grid.bits != 8,
        LIMIT,
        "rounded inputs were tried with weights of 8 bits only",
    )
    asym = [x for x in artifact.layers if not x.grid.sym and x.activation is None]
    if not asym:
        return
    modules = tuple(layer.module for layer in asym)
    if _mixed(artifact.layers) or not artifact.declared.get("dequantize"):
        text = (
            "is asymmetric, which compressed-tensors 0.18 to 0.20 loads only with"
            ' "dequantize": true and one scheme for all layers'
        )
        yield Fact(FAILS, text, modules, "--sym")
    else:
        text = "is asymmetric and therefore dequantized when loaded, to the model's dtype"
        yield Fact(LIMIT, text, modules)


def _undeclared(artifact: Artifact) -> Facts:
    ignore = common.strings(artifact.declared, "ignore", "quantization_config")
    patterns = any(entry.startswith("re:") for entry in ignore)
    left = tuple(module for module in artifact.dense if module not in ignore)
    if left and not patterns:
        yield Fact(FAILS, "is dense, but not in ignore: it would be noise", left)


def _transformers_gguf(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "needs gguf and accelerate; from_pretrained(folder, gguf_file='model.gguf')")
    yield Fact(LIMIT, "transformers dequantizes a GGUF file when it loads it: no memory is saved")


def _vllm(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "from vLLM's source, not run here")
    layers = artifact.layers
    yield from _undivided(layers, "it raises")
    if artifact.format == "gptq_v2":
        yield Fact(LIMIT, "gptq_v2 needs a vLLM that knows checkpoint_format; others misread it")
    if artifact.format != "compressed-tensors":
        yield from _where(
            layers, common.is_head, LIMIT, "only some versions read a quantized lm_head"
        )
        return
    yield from _undeclared(artifact)
    plain = [layer for layer in layers if layer.activation is not None]
    packed = [layer for layer in layers if layer.activation is None]
    yield from _where(plain, lambda x: not x.grid.sym, FAILS, "W8A8 weights must be symmetric")
    yield from _where(
        plain,
        lambda x: x.grid.bits not in (4, 8),
        FAILS,
        "no kernel for weights of this width with rounded inputs",
        "--bits 8",
    )
    yield from _where(
        plain,
        lambda x: x.grid.bits == 4,
        LIMIT,
        "W4A8 needs a recent version, and hardware that it has kernels for",
    )
    yield from _where(
        packed,
        lambda x: not x.grid.sym and x.grid.bits not in (4, 8),
        FAILS,
        "asymmetric weights have 4 or 8 bits",
    )
    yield from _where(
        packed,
        lambda x: x.grid.bits not in (4, 8),
        LIMIT,
        "widths other than 4 and 8 bits need a recent version",
    )


def _llama_cpp(artifact: Artifact) -> Facts:
    yield Fact(LIMIT, "llama.cpp rounds the inputs of quantized matrices to 8 bits (error ~ 1e-2)")
    yield Fact(NOTE, "run with llama-cpp-python 0.3.36; not part of the tests here")


def _mlx(artifact: Artifact) -> Facts:
    if artifact.format == "awq":
        yield from _where(
            artifact.layers,
            lambda x: x.grid.group_size not in _MLX_GROUPS,
            FAILS,
            "mlx has groups of 32, 64 and 128 only",
        )
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
    if artifact.format == "gptq":
        meta = common.mapping(artifact.declared, "meta", "quantization_config")
        yield from _where(
            [] if "quantizer" in meta else artifact.layers,
            lambda x: not x.grid.sym,
            FAILS,
            "GPTQModel refuses sym: false in layout gptq",
            "--format gptq_v2",
        )
    left = _in_blocks(artifact.dense)
    if left and artifact.format != "awq" and not artifact.declared.get("dynamic"):
        yield Fact(FAILS, "is dense, but `dynamic` does not say so", tuple(left))
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
