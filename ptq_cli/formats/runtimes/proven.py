"""What tests/interop loads: in which runtime, which format, which models, which layouts.

Only of these `ptq check` says that they are loaded in the tests. A test holds the table against the
cases of tests/interop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ptq_cli.core.layer import Layer
from ptq_cli.core.names import fold_names, natural
from ptq_cli.formats.runtimes.artifact import Artifact
from ptq_cli.formats.small_floats import numbers

BOTH = (True, False)
Layout = tuple[int | str, bool, int | str | None]


@dataclass(frozen=True)
class Loaded:
    """Models of which the tests load each, and layouts of which they load each on one of them.

    model_types: config.json's
    layouts: bits of the weights (or what small floats and ggml's types are called), whether they
        are symmetric, bits of rounded inputs (or "FP8" beside integers)
    kinds: what is quantized there though it stays dense unless asked for
    """

    model_types: tuple[str, ...]
    layouts: frozenset[Layout]
    kinds: tuple[str, ...] = ()


def _layouts(widths: Iterable[int], *symmetries: bool) -> frozenset[Layout]:
    return frozenset((bits, sym, None) for bits in widths for sym in symmetries)


_DENSE = ("llama", "qwen2")
_WITH_IMAGES = ("qwen3", "llava", "llama")  # LLaVA with a Llama
_IN_LLAMA_CPP = (  # and the words of GGUF files for them
    *("cohere2", "gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "gpt2", "granite", "llama"),
    *("mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen2moe", "qwen3"),
    *("qwen3_moe", "qwen3moe", "smollm3", "starcoder2"),
)
_FOUR = _layouts((4,), True)
_FP8: frozenset[Layout] = frozenset(
    (f"FP8 by {shared}", True, 8) for shared in ("row", "tensor", "block")
)
_FP4_AND_MX: frozenset[Layout] = frozenset(
    (name, True, None) for name in ("NVFP4", "MXFP4", "MXFP8")
)
_ROUNDED: frozenset[Layout] = frozenset(
    {("NVFP4", True, 4), ("MXFP4", True, 4), ("MXFP8", True, 8), (4, True, "FP8")}
)
_LEGACY_BLOCKS = _layouts((4, 5), *BOTH) | _layouts((8,), True)
_GGML_TYPES: frozenset[Layout] = _LEGACY_BLOCKS | {
    (name, True, None)
    for name in (
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
    )
}  # fmt: skip

PROVEN: dict[tuple[str, str], tuple[Loaded, ...]] = {
    ("transformers", "compressed-tensors"): (
        Loaded(_DENSE, _layouts(range(2, 9), *BOTH)),
        Loaded(("llama",), frozenset({(8, True, 8)})),
        Loaded(("llama", "gpt_neox"), _layouts((4,), True), ("output head",)),
        Loaded(_DENSE, _FP8 | _FP4_AND_MX | _ROUNDED),
        Loaded(("qwen3_moe",), frozenset({("FP8 by row", True, 8), ("MXFP4", True, None)})),
        Loaded(
            (
                "bamba", "bart", "bloom", "cohere", "deepseek_v3", "falcon", "gemma2", "gemma3",
                "glm4", "gpt_neox", "granite", "llama", "llama4_text", "llava", "mistral",
                "mistral3", "mixtral", "olmo2", "opt", "phi3", "qwen2", "qwen2_5_vl", "qwen2_moe",
                "qwen3", "qwen3_moe", "qwen3_next", "smollm3", "starcoder2", "t5",
            ),
            _layouts((4,), True),
        ),
    ),
    ("transformers", "gptq"): (
        Loaded(_DENSE, _layouts((2, 3, 4, 8), True)),
        Loaded(_WITH_IMAGES, _FOUR),
    ),
    ("transformers", "gptq_v2"): (
        Loaded(_DENSE, _layouts((2, 3, 4, 8), False) | _layouts((4,), True)),
    ),
    ("transformers", "awq"): (Loaded(_DENSE, _layouts((4,), *BOTH)), Loaded(_WITH_IMAGES, _FOUR)),
    ("transformers", "fp8"): (
        Loaded(_DENSE, frozenset({("FP8 by tensor", True, 8), ("FP8 by block", True, 8)})),
        Loaded(("qwen3_moe",), frozenset({("FP8 by tensor", True, 8)})),
    ),
    ("transformers", "gguf"): (
        Loaded(_DENSE, _LEGACY_BLOCKS),
        Loaded(("llama",), _GGML_TYPES, ("embedding",)),
    ),
    ("gptqmodel", "gptq"): (
        Loaded(_DENSE, _layouts((2, 3, 4, 8), True), ("output head",)),
        Loaded(("qwen3_moe",), _FOUR),
    ),
    ("gptqmodel", "gptq_v2"): (Loaded(_DENSE, _layouts((2, 3, 4, 8), False)),),
    ("gptqmodel", "awq"): (Loaded(_DENSE, _layouts((4,), *BOTH)), Loaded(("qwen3_moe",), _FOUR)),
    ("mlx", "awq"): (Loaded(_DENSE, _layouts((4,), *BOTH)),),
    ("mlx", "mlx"): (
        Loaded(_DENSE, _layouts((2, 3, 4, 5, 6, 8), *BOTH), ("embedding",)),
        Loaded(_DENSE, _FP4_AND_MX),
        Loaded(("mixtral",), frozenset({("MXFP4", True, None)})),
        Loaded((*_WITH_IMAGES, "mixtral"), _FOUR),
    ),
    ("llama.cpp", "gguf"): (
        Loaded(("llama",), _GGML_TYPES, ("embedding", "output head")),
        Loaded(_IN_LLAMA_CPP, _layouts((8,), True)),
    ),
}  # fmt: skip


def untried(artifact: Artifact, runtime: str) -> str | None:
    """Why no test loads such an output; None where one does."""
    rows = PROVEN.get((runtime, artifact.format), ())
    if not rows:
        return f"no test loads {artifact.format} in {runtime}"
    kinds = _model_types(artifact.config)
    rows = tuple(row for row in rows if kinds.issubset(row.model_types))
    kind = " with ".join(sorted(kinds))
    if not rows:
        return f"no test loads a model of type {kind} in {artifact.format} there"
    if dense := artifact.dense_experts:
        return f"no test loads a {kind} with dense experts: {fold_names(dense)}"
    of_rows = [
        [layer.module for layer in artifact.layers if not _is_in(layer, row, artifact)]
        for row in rows
    ]
    fewest = min(of_rows, key=len)
    if not fewest:
        return None
    first = next(layer for layer in artifact.layers if layer.module == fewest[0])
    kind_of_layer = artifact.kind(first)
    what = f"{kind_of_layer}, quantized" if kind_of_layer else said(layout(first))
    names = fold_names(sorted(fewest, key=natural))
    return f"no test loads a {kind} with such layers ({what}): {names}"


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """The model's, and its text model's where that is of a type of its own."""
    own, text = str(config.get("model_type")), config.get("text_config")
    inside = str(text.get("model_type", own)) if isinstance(text, Mapping) else own
    return {own} if inside.startswith(own) else {own, inside}


def _is_in(layer: Layer, row: Loaded, artifact: Artifact) -> bool:
    kind = artifact.kind(layer)
    return layout(layer) in row.layouts and (kind is None or kind in row.kinds)


def layout(layer: Layer) -> Layout:
    grid, inputs = layer.grid, layer.activation
    if not grid.integers or grid.multiples:
        return numbers(grid), True, None if inputs is None else inputs.bits
    floats = inputs is not None and inputs.levels != "integer"
    return (
        grid.bits,
        grid.sym,
        None if inputs is None else f"FP{inputs.bits}" if floats else inputs.bits,
    )


def said(own: Layout) -> str:
    bits, sym, inputs = own
    width = inputs if isinstance(inputs, str) else f"{inputs} bits"
    rounded = "" if inputs is None else f", inputs of {width}"
    if isinstance(bits, str):
        return f"{bits}{rounded}"
    return f"{bits} bits, {'symmetric' if sym else 'asymmetric'}{rounded}"
