"""Which tensors of a checkpoint are quantized, and why the others are left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from ptq_cli.core.layer import Skipped
from ptq_cli.core.names import by_number
from ptq_cli.core.tensors import is_float
from ptq_cli.errors import InputError
from ptq_cli.models.linears import left_alone
from ptq_cli.plan.grid_settings import FLOAT_BITS, GridSettings
from ptq_cli.plan.name_patterns import matches, patterns
from ptq_cli.plan.tensor_types import TensorTypes
from ptq_cli.plan.tied_heads import refuse_lone_head, refuse_missing_head
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor

IGNORED, KEPT_FLOAT = "ignored", f"bits = {FLOAT_BITS}"  # as the user wished
UNREACHED = "no token reaches it"
STORED_AS = "kept as"  # a dense type of GGUF


def choose_tensors(
    checkpoint: Checkpoint,
    settings: GridSettings,
    mixed: TensorTypes,
    unreached: Mapping[str, str] = {},
) -> tuple[list[StoredTensor], list[Skipped]]:
    """The tensors to quantize and those that are copied, layer 10 after layer 9.

    mixed: what a mix rounds, of which more counts than what is left alone by default
    unreached: further tensors that are left alone unless asked for, and why
    """
    names, dense = mixed.names, mixed.dense
    ignore = patterns("--ignore", settings.ignore, checkpoint, names)
    refuse_missing_head(checkpoint, settings.include)
    include = patterns("--include", settings.include, checkpoint, names)
    words = [rule["match"] for rule in settings.layers]
    rules = patterns("[[layers]] match", words, checkpoint, names)
    pairs = zip(rules, settings.layers, strict=True)
    ignore += [pattern for pattern, rule in pairs if rule.get("skip")]
    reasons = {**unreached, **_left_alone(checkpoint, mixed)}
    chosen, skipped = [], []
    for name in by_number(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        spec, reason = tensor.spec, reasons.get(name)
        possible = is_float(spec) and len(spec.shape) >= 2 and prod(spec.shape) > 0
        if reason and possible and any(matches(p, tensor, names) for p in include):
            reason = None
        if any(matches(p, tensor, names) for p in ignore):
            reason = IGNORED
        if not reason and rule_of(settings, tensor, names).get("bits") == FLOAT_BITS:
            reason = KEPT_FLOAT
        if not reason and name in dense:
            reason = f"{STORED_AS} {dense[name]}"
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
        if not any(matches(pattern, tensor, names) for tensor in chosen):
            raise InputError(
                f"--include {pattern.pattern!r} matches no tensor that could be quantized in"
                f" {checkpoint.path}"
            )
    refuse_lone_head(checkpoint, [tensor.spec.name for tensor in chosen])
    return chosen, skipped


def _left_alone(checkpoint: Checkpoint, mixed: TensorTypes) -> dict[str, str]:
    """Tensors that are left alone unless asked for, and why."""
    reasons = left_alone(checkpoint.specs, checkpoint.config)
    if not mixed.types:
        return reasons
    others = dict.fromkeys(checkpoint.tensors, "llama.cpp keeps it") | reasons
    return {name: why for name, why in others.items() if name not in mixed.types}


def rule_of(
    settings: GridSettings, tensor: StoredTensor, names: Mapping[str, str] = {}
) -> dict[str, Any]:
    """What the recipe's rules say of a tensor; a later rule wins over an earlier one. names: GGUF's
    of tensors, which a rule may mean too"""
    matching = [r for r in settings.layers if matches(re.compile(r["match"]), tensor, names)]
    return {key: value for rule in matching for key, value in rule.items()}
