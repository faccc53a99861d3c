"""What the layouts of other tools have in common: their limits, their headers, their offsets.

Pure functions over values; nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.names import natural
from ptq_cli.core.plugins import ModuleTree
from ptq_cli.core.tensors import Array, Codes, TensorSpec
from ptq_cli.core.weight import QuantizedWeight
from ptq_cli.errors import InputError
from ptq_cli.numerics.scales import SCALE_DTYPES, ScaleOverflow

T = TypeVar("T", int, bool)

SCALE_WORDS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
SCALE_NAMES = {word: name for name, word in SCALE_WORDS.items()}
_STATED = {**SCALE_WORDS, "half": "F16", "float": "F32", "float64": "F32", "double": "F32"}

HEADS = ("lm_head", "embed_out")  # transformers calls the latter lm_head, too
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens\w*|embed_positions|embed_in|wte|wpe|word_embeddings|tok_embeddings|shared"
    r"|(position|token|patch)_embeddings?)$"
)
_KERNEL_GROUPS = (32, 64, 128, 256)
NUMBERS = {
    "integer": "integers", "e2m1": "FP4 numbers (E2M1)", "e4m3": "FP8 numbers (E4M3)",
    "iq4_nl": "levels of IQ4",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a layout can hold, 4 bits among others. `group_sizes`: None is any; `short_group`: the
    last group of a row may be short; `whole_row`: group_size −1; `whole_tensor`: group_size 0. What
    shares a scale is looked at for integers only."""

    bits: tuple[int, ...]
    scale_dtypes: tuple[str, ...] = ("float16",)
    group_sizes: tuple[int, ...] | None = None
    whole_row: bool = True
    whole_tensor: bool = False
    short_group: bool = False
    reordered: bool = False
    embeddings: bool = False
    transposed: bool = False
    activations: bool = False
    levels: tuple[str, ...] = ("integer",)
    own_offsets: bool = False


def misfit(layer: Layer, name: str, limits: Limits) -> Misfit | None:
    """Why layout `name` cannot hold the layer, and what would help; or None."""
    grid = layer.grid
    if len(layer.full_shape) != 2:
        return Misfit(f"{name} holds matrices, not tensors of {len(layer.full_shape)} dimensions")
    if not layer.tensor.endswith(".weight"):
        return Misfit(
            f"{name} holds weights of Linears, not bare parameters", f"--ignore {layer.tensor}"
        )
    if layer.transposed and not limits.transposed:
        return Misfit(f"{name} holds weights stored [out, in], not [in, out]", "--format ptq")
    if not limits.embeddings and _EMBEDDING.search(layer.module):
        return Misfit(f"{name} holds linears, not embeddings", f"--ignore {layer.module}")
    if grid.levels not in limits.levels:
        held = " or ".join(NUMBERS[levels] for levels in limits.levels)
        reason = f"{name} holds {held}, not {NUMBERS[grid.levels]}"
        holder = "gguf" if grid.levels == "iq4_nl" else "compressed-tensors"
        return Misfit(reason, f"--format {holder}")
    if grid.multiples and grid.scale_dtype not in limits.scale_dtypes:
        reason = f"{name} has no scales that are multiples of another (K-quants, IQ4_XS)"
        return Misfit(reason, "--format gguf")
    if grid.own_offsets and not limits.own_offsets:
        reason = f"{name} holds whole zeros, not offsets of any size (Q4_1, Q5_1)"
        return Misfit(reason, "--format gguf")
    if grid.bits not in limits.bits:
        held = ", ".join(map(str, limits.bits))
        return Misfit(f"{name} holds {held} bits, not {grid.bits}", "--bits 4")
    if layer.activation is not None and not limits.activations:
        return Misfit(f"{name} does not round inputs", "--format compressed-tensors")
    if layer.reordered and not limits.reordered:
        hint = "--act-order static or --format gptq"
        return Misfit(f"{name} has no g_idx for --act-order desc", hint)
    if grid.scale_dtype not in limits.scale_dtypes:
        held = " or ".join(limits.scale_dtypes)
        reason = f"{name} stores scales as {held}, not {grid.scale_dtype}"
        return Misfit(reason, f"--scale-dtype {limits.scale_dtypes[0]}")
    return _group_misfit(layer, name, limits) if grid.integers else None


def _group_misfit(layer: Layer, name: str, limits: Limits) -> Misfit | None:
    size, columns = layer.grid.group_size, layer.shape[1]
    sizes = sorted(limits.group_sizes or (128, 64, 32), reverse=True)
    fitting = [own for own in sizes if columns % own == 0] + ([-1] if limits.whole_row else [])
    hint = f"--group-size {fitting[0]}" if fitting else None
    if size == 0:
        if limits.whole_tensor:
            return None
        reason = f"{name} has no scale for the whole tensor (group_size 0)"
        return Misfit(reason, "--group-size -1" if limits.whole_row else hint)
    if size < 0:
        return None if limits.whole_row else Misfit(f"{name} has no whole-row groups", hint)
    if limits.group_sizes is not None and size not in limits.group_sizes:
        held = ", ".join(map(str, limits.group_sizes))
        return Misfit(f"{name} has groups of {held}, not {size}", hint)
    if columns % size and not limits.short_group:
        reason = f"group_size {size} does not divide in_features {columns}, as {name} needs"
        return Misfit(reason, hint)
    return None


def modules_with(
    specs: Iterable[str], *suffixes: str, declared: str | None = None
) -> tuple[str, ...]:
    """Modules of which a tensor with one of these suffixes is there, in natural order.

    declared: where it is said that there are some. Raises InputError where there is none then.
    """
    found = {name[: -len(suffix)] for name in specs for suffix in suffixes if name.endswith(suffix)}
    if declared and not found:
        raise InputError(
            f"{declared}, but no tensor is named *{suffixes[0]}",
            hint="take quantization_config out of config.json if all weights are float",
        )
    return tuple(sorted(found, key=natural))


def tensor(specs: Mapping[str, TensorSpec], name: str, rank: int) -> TensorSpec:
    """The spec of that name. Raises InputError where it is missing or of another rank."""
    spec = specs.get(name)
    if spec is None:
        raise InputError(f"tensor {name!r} is missing")
    if len(spec.shape) != rank:
        raise InputError(f"tensor {name!r} has shape {list(spec.shape)}, {rank} axes were expected")
    return spec


def check_specs(specs: Mapping[str, TensorSpec], expected: Iterable[TensorSpec], why: str) -> None:
    """Every expected tensor is in the header as expected. Raises InputError with both."""
    for spec in expected:
        found = tensor(specs, spec.name, len(spec.shape))
        if found != spec:
            raise InputError(
                f"tensor {spec.name!r} is {found.dtype} {list(found.shape)}; {why} asks for"
                f" {spec.dtype} {list(spec.shape)}"
            )


def scale_name(spec: TensorSpec) -> str:
    """The grid's word for the dtype of a tensor of scales. Raises InputError for others."""
    if spec.dtype not in SCALE_NAMES:
        raise InputError(f"tensor {spec.name!r} is {spec.dtype}; scales are F16, BF16 or F32")
    return SCALE_NAMES[spec.dtype]


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The model's dtype as config.json states it, in safetensors' word ("F32" for wider ones), or
    None where it does not. What stands inside `text_config` is not looked at."""
    word = config.get("dtype") or config.get("torch_dtype")
    return _STATED.get(str(word).removeprefix("torch."))


def model_dtype(config: Mapping[str, Any], dtypes: Collection[str] = ()) -> str:
    """The one dtype in which loaders hold the model, scales included, in safetensors' word.

    transformers takes what config.json states, else that of the first tensor in the file; vLLM
    looks into `text_config` before that. Where these may differ it is the narrowest of them: its
    values lose nothing in the others (of bfloat16 in float16, but at the ends of the range).

    dtypes: of tensors in the checkpoint
    """
    stated = stated_dtype(config)
    if stated is not None:
        return stated
    text = config.get("text_config")
    inside = stated_dtype(text) if isinstance(text, Mapping) else None
    return next((word for word in ("BF16", "F16") if word in {*dtypes, inside}), "F32")


def linear(module: str, shape: tuple[int, int], grid: Grid, config: Mapping[str, Any]) -> Layer:
    """A layer that is a linear, in the model's dtype."""
    return Layer(module, f"{module}.weight", shape, shape, model_dtype(config), grid)


def left_dense_names(layers: Sequence[Layer], dense: Sequence[str], tree: ModuleTree) -> list[str]:
    """Names of what is left dense, for runtimes: a head that is tied has no tensor of its own, but
    has to be named."""
    left = [name for module in dense for name in tree.names(module)]
    headless = not any(module.endswith("lm_head") for module in dense)
    return [*left, "lm_head"] if headless and not any(map(is_head, layers)) else left


def is_head(layer: Layer) -> bool:
    return layer.module.rpartition(".")[2] in HEADS


def outside_cpu_kernel(layer: Layer) -> bool:
    """GPTQModel's default CPU kernel for 4 bits, which transformers takes too, fails at the first
    forward of such a layer; other backends do not."""
    grid = layer.grid
    return grid.bits == 4 and (grid.group_size not in _KERNEL_GROUPS or layer.shape[0] % 16 != 0)


def rope_of_old(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` where config.json has them only in `rope_parameters`, which
    mlx-lm 0.32 does not read."""
    newer = config.get("rope_parameters")
    if not isinstance(newer, Mapping) or "rope_theta" not in newer:
        return {}
    found = {} if "rope_theta" in config else {"rope_theta": newer["rope_theta"]}
    if newer.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        found["rope_scaling"] = {k: v for k, v in newer.items() if k != "rope_theta"}
    return found


def mapping(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object of a foreign config, {} where there is none. Raises InputError for others."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} is {value!r}, an object was expected")
    return value


def strings(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of names of a foreign config, () where there is none. Raises InputError for others."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise InputError(f"{where}: {key} is {value!r}, a list of names was expected")
    return tuple(value)


def setting(
    config: Mapping[str, Any], key: str, kind: type[T], where: str, default: T | None = None
) -> T:
    """A whole number or a truth value of a foreign config. Raises InputError for anything else."""
    value = config.get(key, default)
    if type(value) is not kind:
        wanted = "true or false" if kind is bool else "a whole number"
        raise InputError(f"{where}: {key} is {value!r}, {wanted} was expected")
    return value


def refuse_unknown(config: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """A key this tool does not know may change what the tensors mean. Empty ones change nothing."""
    unknown = sorted(key for key in config.keys() - set(known) if config[key])
    if unknown:
        raise InputError(f"{where}: {', '.join(unknown)} is not a setting this tool understands")


def may_mirror(layer: Layer) -> bool:
    """Whether runtimes compute with mirrored groups of such a layer (`Grid.mirrored`). Not where
    inputs are rounded too: kernels of integers take scales for positive."""
    grid = layer.grid
    whole = grid.integers and grid.sym and not grid.narrow_range and not grid.multiples
    return whole and layer.activation is None


def perhaps_mirrored(layer: Layer) -> Layer:
    """A layer of a folder whose scales, which are not read yet, may be negative."""
    return replace(layer, grid=replace(layer.grid, mirrored=may_mirror(layer)))


def signed_scales(layer: Layer, rounded: QuantizedWeight) -> QuantizedWeight:
    """A weight as layouts hold it whose zero is always the middle of a symmetric grid: a mirrored
    group has a negative scale, as `s · (code − (mid − 1)) = −s · ((max − code) − mid)`.

    Raises:
        InputError: as `integer_zeros`.
    """
    zeros, grid = integer_zeros(layer, rounded), layer.grid
    mirrored = zeros == grid.mid_code - 1
    if not grid.mirrored or not mirrored.any():
        return rounded
    columns = mirrored[:, rounded.column_groups()]
    return replace(
        rounded,
        codes=np.where(columns, np.uint8(grid.max_code) - rounded.codes, rounded.codes),
        scales=np.where(mirrored, -rounded.scales, rounded.scales),
        zeros=np.where(mirrored, np.uint8(grid.mid_code), zeros),
    )


def positive_scales(stored: QuantizedWeight) -> QuantizedWeight:
    """A weight as it was decoded; on a mirrored grid negative scales become positive ones, as
    `−s · (code − zero) = s · ((max − code) − (max − zero))`."""
    negative = np.signbit(stored.scales)
    if not stored.grid.mirrored or not negative.any():
        return stored
    highest = np.uint8(stored.grid.max_code)
    flipped = np.where(negative, highest, np.uint8(0))  # max − code = max XOR code
    return replace(
        stored,
        codes=stored.codes ^ flipped[:, stored.column_groups()],
        scales=np.abs(stored.scales),
        zeros=stored.zeros ^ flipped,
    )


def integer_zeros(layer: Layer, rounded: QuantizedWeight) -> Codes:
    """The zeros, for layouts that store no offsets.

    Offsets are accepted where they are `−zeros · scales` rounded to their dtype, as a layout with
    offsets writes zeros.

    Raises:
        InputError: the offsets are between two zeros.
    """
    offsets = rounded.offsets
    if offsets is None or np.array_equal(offsets, _offsets_of_zeros(rounded, offsets.dtype)):
        return rounded.zeros
    raise InputError(
        f"{layer.module}: its offsets are no whole multiples of its scales, so whole zeros"
        " cannot say them",
        hint="quantize the float model again, or --format mlx or --format gguf",
    )


def offsets(layer: Layer, rounded: QuantizedWeight) -> Array:
    """`−zeros · scales`, or the offsets it came with, in the dtype of the grid's scales.

    Raises:
        ScaleOverflow: an offset is too large for the dtype.
        InputError: it loses digits in it.
    """
    dtype, own = SCALE_DTYPES[layer.grid.scale_dtype], rounded.offsets
    if own is not None and np.array_equal(own.astype(dtype).astype(own.dtype), own):
        result = own.astype(dtype)
    else:
        integer_zeros(layer, rounded)
        result = _offsets_of_zeros(rounded, dtype)
    if not np.isfinite(result.astype(np.float32)).all():
        raise ScaleOverflow(
            f"an offset (−zero · scale) does not fit {layer.grid.scale_dtype}", hint="--sym"
        )
    return result


def _offsets_of_zeros(rounded: QuantizedWeight, dtype: np.dtype[Any]) -> Array:
    exact = -(rounded.zeros.astype(np.float32) * rounded.scales.astype(np.float32))
    with np.errstate(over="ignore"):
        return exact.astype(dtype)


def from_offsets(scales: Array, stored: Array, grid: Grid) -> tuple[Codes, Array | None]:
    """The zeros nearest to stored offsets, and the offsets themselves where they say more."""
    wide, own = scales.astype(np.float32), stored.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # who loads it refuses what is not finite
        ratio = np.divide(-own, wide, out=np.zeros_like(own), where=wide != 0)
        zeros = np.clip(np.rint(ratio), 0, grid.max_code).astype(np.uint8)
    exact = np.array_equal(-(zeros * wide), own)
    return zeros, None if exact else stored
