"""Settings of the grid, the tensors and the layout: what every quantizing command shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptq_cli.plan.mixes import MIX_NAMES, MIXES
from ptq_cli.plan.prediction import check_allocation
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.registry import FORMATS, SMOOTHERS, method, smoother

KV_CACHES = ("fp8", "fp8-head")  # of `kv_cache`

FLOAT_BITS = 16  # of a layer, or of all that `ptq smoothquant` writes: nothing is rounded


@dataclass(frozen=True)
class GridSettings:
    """Settings of the grid, the tensors and the layout: common to every quantizing command."""

    scheme: str = field(
        default="",
        metadata={
            "help": f"Numbers of weights and inputs: {', '.join(SCHEMES)}; or a type for each"
            f" tensor of a GGUF file, as llama.cpp mixes them: {', '.join(MIXES)}."
            " (docs/settings.md says what each stands for.)",
            "metavar": "NAME",
            "choices": (*SCHEMES, *MIX_NAMES),
        },
    )
    bits: int = field(
        default=4, metadata={"help": "Bits per weight.", "min": 2, "max": 8, "short": "-b"}
    )
    group_size: int = field(
        default=128,
        metadata={
            "help": "Columns that share a scale; -1: the whole row, 0: the whole tensor.",
            "min": -1,
            "short": "-g",
        },
    )
    sym: bool = field(
        default=True,
        metadata={"help": "Zero in the middle of the codes, or chosen per group.", "off": "asym"},
    )
    narrow_range: bool = field(
        default=False,
        metadata={"help": "Symmetric codes within ±(2^(bits−1) − 1), as integer runtimes like it."},
    )
    scale_dtype: str = field(
        default="auto",
        metadata={
            "help": "What scales are stored in; auto: what the format and loaders want, and a wider"
            " range where a weight needs it.",
            "choices": ("auto", "float16", "bfloat16", "float32"),
        },
    )
    global_scale: str = field(
        default="float32",
        metadata={
            "help": "Of NVFP4's scales: as it comes, or the power of two below, with which bfloat16"
            " holds their products exactly.",
            "choices": ("float32", "power-of-two"),
            "needs": ({"scheme": ("NVFP4", "NVFP4A16")},),
        },
    )
    tensor_type: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Another of ggml's types than the mix's for tensors whose name, here or in"
            " GGUF, holds REGEX; may be repeated, a later one wins. F16, BF16 and F32 leave them"
            " dense.",
            "metavar": "REGEX=TYPE",
            "needs": ({"mix": (True,)},),
        },
    )
    output_tensor_type: str = field(
        default="",
        metadata={
            "help": "The same for the output head.",
            "metavar": "TYPE",
            "needs": ({"mix": (True,)},),
        },
    )
    token_embedding_type: str = field(
        default="",
        metadata={
            "help": "The same for the embedding of the tokens.",
            "metavar": "TYPE",
            "needs": ({"mix": (True,)},),
        },
    )
    pure: bool = field(
        default=False,
        metadata={
            "help": "The mix's main type for every tensor, head and embedding included.",
            "needs": ({"mix": (True,)},),
        },
    )
    ignore: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Leave tensors alone whose name holds REGEX.", "metavar": "REGEX"},
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Quantize also what is left alone by default (embeddings, lm_head, tensors"
            " of higher rank seen as [first dimension, all others]).",
            "metavar": "REGEX",
        },
    )
    layers: tuple[Mapping[str, Any], ...] = field(
        default=(), metadata={"help": "Settings of single layers.", "recipe_only": True}
    )
    allocation: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "What ptq allocate predicted of `layers`; it is shown, and changes nothing.",
            "recipe_only": True,
            "check": check_allocation,
        },
    )
    family: str = field(
        default="",
        metadata={"help": "The family of models that tells the sites.", "recipe_only": True},
    )
    sites: tuple[Mapping[str, Any], ...] = field(
        default=(),
        metadata={"help": "Linears that share an input, and what feeds them.", "recipe_only": True},
    )
    kv_cache: str = field(
        default="",
        metadata={
            "help": "Round the keys and values that attention caches, too, with scales from the"
            " tokens: fp8, E4M3 with a scale for each block; fp8-head, with one for each key head.",
            "choices": KV_CACHES,
            "needs": ({"tokens": (True,)},),
        },
    )
    format: str = field(
        default="ptq",
        metadata={
            "help": "Layout of the output.",
            "choices": tuple(FORMATS),
            "section": "Output",
        },
    )
    on_misfit: str = field(
        default="error",
        metadata={
            "help": "What happens to layers that the format cannot hold: an error, or they are"
            " kept as they are and declared so.",
            "choices": ("error", "keep"),
            "section": "Output",
        },
    )


# What a rule of a recipe's [[layers]] may say; `bits` may be FLOAT_BITS there.
GRID_KEYS = ("scheme", "bits", "group_size", "sym", "narrow_range", "scale_dtype")
LAYER_KEYS = ("match", *GRID_KEYS, "type", "skip")


def settings_classes(command: str) -> tuple[type[Any], ...]:
    """The settings of the grid, then those of the command's method; a smoother can be followed by
    GPTQ and has its settings too."""
    if command in SMOOTHERS:
        return GridSettings, smoother(command).settings, method("gptq").settings
    return GridSettings, method("rtn" if command == "pack" else command).settings


def default_settings(command: str) -> Mapping[str, Any]:
    """Defaults that are not the fields' own."""
    if command == "pack":
        return {"mse": False}
    return smoother(command).defaults if command in SMOOTHERS else {}


def may_stay_float(command: str) -> bool:
    """Whether its `bits` may be 16: smoothed weights, and nothing rounded."""
    return command in SMOOTHERS and smoother(command).floats
