"""What runtimes load, from files alone: facts about an output, each with its reason.

Proven by running the clients (tests/interop): transformers 5.23 with GPTQModel 7.6,
compressed-tensors 0.20 and gguf 0.19; mlx-lm 0.32; llama.cpp (xllamacpp 2026.10). Facts about vLLM
come from its source. What the tests load stands in proven.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ptq_cli.errors import InputError
from ptq_cli.formats import common, fused
from ptq_cli.formats.runtimes import in_transformers
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
from ptq_cli.formats.runtimes.in_transformers import gptqmodel_kernels, in_blocks, undeclared
from ptq_cli.formats.runtimes.proven import untried

LOADED, UNTRIED = "loaded in our tests", "not tried"
UNLOADED = "known not to load"


def facts(artifact: Artifact, runtime: str) -> list[Fact]:
    """All facts, the worst first. Raises InputError for an unknown runtime."""
    if runtime not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime!r}", hint=f"known: {', '.join(RUNTIMES)}")
    found, loaders = list(_model(artifact, runtime)), RUNTIMES[runtime]
    if artifact.format in loaders:
        found += loaders[artifact.format](artifact)
    else:
        text = f"{runtime} does not read format {artifact.format}"
        found.append(Fact(FAILS, text, hint=_packed_as(artifact, *loaders)))
    return sorted(found, key=lambda fact: (FAILS, LIMIT, NOTE).index(fact.level))


def loads(found: Iterable[Fact]) -> bool:
    return not any(fact.level == FAILS for fact in found)


def verdict(artifact: Artifact, runtime: str, found: Iterable[Fact]) -> tuple[str, str | None]:
    """One of LOADED, UNLOADED, UNTRIED, and why it is not the first."""
    failing = [fact for fact in found if fact.level == FAILS]
    if failing:
        return UNLOADED, str(failing[0])
    why = untried(artifact, runtime)
    return (LOADED, None) if why is None else (UNTRIED, why)


def _packed_as(artifact: Artifact, *names: str) -> str | None:
    """The first format that could hold the layers, as a command."""
    could = [name for name in names if artifact.repack is None or name in artifact.repack]
    return f"ptq pack --format {could[0]}" if could else None


def _model(artifact: Artifact, runtime: str) -> Facts:
    if artifact.format == "gguf":
        return
    if not artifact.config.get("model_type"):
        text = "config.json with a model_type is missing"
        yield Fact(FAILS, text, hint="quantize the model's folder")
    if runtime == "mlx" and "tokenizer.json" not in artifact.files:
        yield Fact(FAILS, "mlx_lm.load wants a tokenizer in the folder, and there is none")


def _vllm(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "from vLLM's source, not run here")
    layers = artifact.layers
    yield from routers(artifact)
    yield from tied_heads(artifact, LIMIT, "vLLM leaves it out and takes the embedding")
    text = "is an expert beside others that are dense or have another grid: vLLM joins them"
    yield from about(artifact.mixed_experts(), FAILS, text)
    yield from undivided(layers, ": it raises")
    if artifact.format == "gptq_v2":
        yield Fact(LIMIT, "gptq_v2 needs a vLLM that knows checkpoint_format; others misread it")
    yield from _vllm_floats(artifact)
    if artifact.format != "awq" and any(common.may_mirror(x) and x.grid.bits == 4 for x in layers):
        text = (
            "scales of symmetric groups may be negative: VLLM_MARLIN_INPUT_DTYPE=int8, off unless"
            " asked for, misreads those of 4 bits (vLLM issue 48905)"
        )
        yield Fact(NOTE, text)
    if artifact.format == "fp8":
        return
    if artifact.format != "compressed-tensors":
        yield from about(artifact.heads, LIMIT, "only some versions read a quantized lm_head")
        return
    yield from undeclared(artifact)
    yield from asymmetric_experts(artifact)
    layers = [layer for layer in layers if layer.grid.integers]
    rounded = [layer for layer in layers if layer.activation is not None]
    asymmetric = [layer.module for layer in rounded if not layer.grid.sym]
    yield from about(asymmetric, FAILS, "W8A8 weights must be symmetric")
    odd = [layer.module for layer in rounded if layer.grid.bits not in (4, 8)]
    text = "no kernel for weights of this width with rounded inputs"
    yield from about(odd, FAILS, text, "--bits 8")
    narrow = [layer.module for layer in rounded if layer.grid.bits == 4]
    text = "W4A8 needs a recent version, and hardware that it has kernels for"
    yield from about(narrow, LIMIT, text)
    unrounded = [
        layer for layer in layers if layer.activation is None and layer.grid.bits not in (4, 8)
    ]
    asymmetric = [layer.module for layer in unrounded if not layer.grid.sym]
    yield from about(asymmetric, FAILS, "asymmetric weights have 4 or 8 bits")
    odd = [layer.module for layer in unrounded]
    yield from about(odd, LIMIT, "widths other than 4 and 8 bits need a recent version")


def _vllm_floats(artifact: Artifact) -> Facts:
    floats = [layer for layer in artifact.layers if not layer.grid.integers]
    fp4 = [x.module for x in floats if x.activation is not None and x.activation.bits == 4]
    text = "inputs in FP4 need hardware that has it (Blackwell); elsewhere only weights are in FP4"
    yield from about(fp4, LIMIT, text)
    fp8 = [x.module for x in artifact.layers if x.activation and x.activation.levels == "e4m3"]
    text = "inputs in FP8 need hardware that has it (compute capability 8.9, MI300)"
    yield from about(fp8, LIMIT, text)
    blocks = [x for x in floats if x.grid.block_rows > 1 and x.shape[0] % x.grid.block_rows]
    merged = [x.module for x in blocks if x.module.endswith(fused.BEFORE_OTHERS)]
    text = "out_features is no multiple of the block, in a matrix that vLLM fuses: it raises"
    yield from about(merged, FAILS, text, "--scheme FP8_DYNAMIC")
    if artifact.format == "fp8":
        whole = [layer.module for layer in floats if layer.grid.group_size == 0]
        text = "vLLM has other names for the scales of whole tensors"
        yield from about(whole, FAILS, text, "--format compressed-tensors")


def _llama_cpp(artifact: Artifact) -> Facts:
    yield Fact(LIMIT, "llama.cpp rounds the inputs of quantized matrices to 8 bits (error ~ 1e-2)")
    yield Fact(NOTE, "proven: xllamacpp 2026.10, on a CPU")


def _mlx(artifact: Artifact) -> Facts:
    yield from tied_heads(artifact, FAILS, "mlx-lm has no such module")
    if artifact.format == "awq":
        other = [
            layer.module for layer in artifact.layers if layer.grid.group_size not in (32, 64, 128)
        ]
        yield from about(other, FAILS, "mlx has groups of 32, 64 and 128 only")
    elif artifact.format != "mlx":
        text = "mlx-lm refuses every g_idx tensor"
        yield Fact(FAILS, text, hint=_packed_as(artifact, "mlx"))
    if common.rope_of_old(artifact.config):
        text = "mlx-lm 0.32 does not read rope_parameters"
        yield Fact(FAILS, text, hint=_packed_as(artifact, "mlx"))
    if common.model_dtype(artifact.config) != "F32":
        text = "on a CPU mlx accumulates in the model's dtype"
        yield Fact(NOTE, text, hint="set_dtype(float32) helps")


def _gptqmodel(artifact: Artifact) -> Facts:
    yield Fact(NOTE, "proven: gptqmodel 7.6.0 with torch 2.13")
    meta = common.mapping(artifact.declared, "meta", "quantization_config")
    if artifact.format == "gptq" and "quantizer" not in meta:
        asymmetric = [layer.module for layer in artifact.layers if not layer.grid.sym]
        text = "GPTQModel refuses sym: false in layout gptq"
        yield from about(asymmetric, FAILS, text, "--format gptq_v2")
    yield from routers(artifact)
    yield from tied_heads(artifact, FAILS, "it raises")
    if artifact.format != "awq" and not artifact.declared.get("dynamic"):
        text = "is dense, but `dynamic` does not say so"
        yield from about(in_blocks(artifact.dense_linears), FAILS, text)
    yield from gptqmodel_kernels(artifact)


# What each runtime reads, the format to choose for it first.
RUNTIMES: dict[str, dict[str, Callable[[Artifact], Facts]]] = {
    "transformers": {
        "compressed-tensors": in_transformers.compressed,
        **dict.fromkeys(("gptq", "gptq_v2"), in_transformers.gptq),
        "awq": in_transformers.awq,
        "fp8": in_transformers.fp8,
        "gguf": in_transformers.gguf,
        "mlx": in_transformers.mlx,
    },
    "vllm": dict.fromkeys(("compressed-tensors", "gptq", "gptq_v2", "awq", "fp8"), _vllm),
    "llama.cpp": {"gguf": _llama_cpp},
    "mlx": dict.fromkeys(("mlx", "awq", "gptq", "gptq_v2"), _mlx),
    "gptqmodel": dict.fromkeys(("gptq", "gptq_v2", "awq"), _gptqmodel),
}
