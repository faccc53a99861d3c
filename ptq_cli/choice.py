"""Which tensors of a checkpoint are quantized, and why the others are left alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.grid_settings import FLOAT_BITS, GridSettings
from ptq_cli.models.detection import Sites, find_sites
from ptq_cli.models.recipe import merge_sites, recipe_sites
from ptq_cli.models.sites import Site
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor, is_float
from ptq_cli.storage.folder import mlx_weights
from ptq_cli.storage.tensors import WRITABLE
from ptq_cli.values import (
    FLOAT_DTYPES,
    Skipped,
)

_LEFT_ALONE = (
    ("embedding", re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)(\.|$)", re.IGNORECASE)),
    ("norm", re.compile(r"(^|\.)(\w*norm\w*|ln_\w+|ln\d*)(\.|$)", re.IGNORECASE)),
    ("output head", re.compile(r"(^|\.)lm_head(\.|$)|^(output|embed_out|score)(\.|$)")),
)


_EMBEDDING = _LEFT_ALONE[0][1]


_QUANTIZED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|SCB)$"
)


def model_sites(checkpoint: Checkpoint, settings: GridSettings | None = None) -> Sites:
    """The sites of a model: those a recipe names, and those its family's table tells.

    Raises:
        InputError: a recipe's family or sites do not fit the checkpoint.
    """
    specs = {name: stored.spec for name, stored in checkpoint.tensors.items()}
    family, named = (settings.family, settings.sites) if settings else ("", ())
    found = find_sites(specs, checkpoint.config or None, family or None)
    if not named:
        return found
    return replace(found, sites=merge_sites(found.sites, recipe_sites(named, specs)))


def transposed_tensors(sites: Sequence[Site]) -> frozenset[str]:
    """Tensors that are stored [in_features, out_features]."""
    linears = (linear for site in sites for linear in site.linears)
    return frozenset(linear.tensor for linear in linears if linear.transposed)


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds packed weights."""
    return bool(_packed(checkpoint)) or bool(checkpoint.root and _declared(checkpoint))


def _packed(checkpoint: Checkpoint) -> list[str]:
    named = [name for name in checkpoint.tensors if _QUANTIZED_NAMES.search(name)]
    return named + mlx_weights(checkpoint)


def _declared(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.get("quantization_config"))


def check_float(checkpoint: Checkpoint) -> None:
    """Refuse what is quantized already, and dtypes that could not be copied."""
    packed = _packed(checkpoint)
    if is_quantized(checkpoint):
        what = f"tensor {packed[0]!r}" if packed else "config.json has a quantization_config"
        raise InputError(
            f"{checkpoint.path}: quantized already ({what})", hint="start from the float model"
        )
    for stored in checkpoint.tensors.values():
        if stored.spec.dtype not in WRITABLE:
            raise InputError(
                f"{stored.file}: tensor {stored.spec.name!r}: dtype {stored.spec.dtype} can be"
                " neither quantized nor copied"
            )


def default_reason(tensor: StoredTensor) -> str | None:
    """Why a tensor is left alone unless asked for, or None where it is quantized."""
    spec = tensor.spec
    if not is_float(spec):
        return f"dtype {spec.dtype}"
    if prod(spec.shape) == 0:
        return "empty"
    if len(spec.shape) != 2:
        return f"rank {len(spec.shape)}"
    for kind, pattern in _LEFT_ALONE:
        if pattern.search(spec.name.removesuffix(".weight")):
            return kind
    return None if spec.name.endswith(".weight") else "not a .weight"


def choose_tensors(
    checkpoint: Checkpoint, settings: GridSettings
) -> tuple[list[StoredTensor], list[Skipped]]:
    """The tensors to quantize, in the order of the files, and those that are copied."""
    ignore = _patterns("--ignore", settings.ignore, checkpoint)
    include = _patterns("--include", settings.include, checkpoint)
    rules = _patterns("[[layers]] match", [rule["match"] for rule in settings.layers], checkpoint)
    pairs = zip(rules, settings.layers, strict=True)
    ignore += [pattern for pattern, rule in pairs if rule.get("skip")]
    chosen, skipped = [], []
    for tensor in checkpoint.tensors.values():
        spec, reason = tensor.spec, default_reason(tensor)
        possible = is_float(spec) and len(spec.shape) >= 2 and prod(spec.shape) > 0
        if reason and possible and any(p.search(spec.name) for p in include):
            reason = None
        if any(p.search(spec.name) for p in ignore):
            reason = "ignored"
        if not reason and rule_of(settings, spec.name).get("bits") == FLOAT_BITS:
            reason = f"bits = {FLOAT_BITS}"
        if reason:
            skipped.append(Skipped(spec.name, spec.shape, spec.dtype, reason))
        else:
            chosen.append(tensor)
    if not chosen:
        raise InputError(
            f"{checkpoint.path}: none of its {len(skipped)} tensors is left to quantize",
            hint="--include REGEX takes tensors in",
        )
    for pattern in include:
        if not any(pattern.search(tensor.spec.name) for tensor in chosen):
            raise InputError(
                f"--include {pattern.pattern!r} matches no tensor that could be quantized in"
                f" {checkpoint.path}"
            )
    return chosen, skipped


def rule_of(settings: GridSettings, tensor: str) -> dict[str, Any]:
    """What the recipe's rules say of a tensor; a later rule wins over an earlier one."""
    matching = [rule for rule in settings.layers if re.search(rule["match"], tensor)]
    return {key: value for rule in matching for key, value in rule.items()}


def _patterns(setting: str, words: Sequence[str], checkpoint: Checkpoint) -> list[re.Pattern[str]]:
    patterns = []
    for word in words:
        try:
            pattern = re.compile(word)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{setting} {word!r}: not a regular expression: {error}") from None
        if not any(pattern.search(name) for name in checkpoint.tensors):
            raise InputError(
                f"{setting} {word!r} matches no tensor of {checkpoint.path}",
                hint=f"names look like {next(iter(checkpoint.tensors), 'nothing')!r}",
            )
        patterns.append(pattern)
    return patterns


def dense_modules(skipped: Sequence[Skipped]) -> list[str]:
    """Linears that are left in floating point: runtimes want them declared."""
    return [
        entry.tensor.removesuffix(".weight")
        for entry in skipped
        if entry.tensor.endswith(".weight")
        and len(entry.shape) == 2
        and entry.dtype in FLOAT_DTYPES
        and not _EMBEDDING.search(entry.tensor.removesuffix(".weight"))
    ]
