"""Which tensors of a checkpoint are quantized, and why the others are left alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

from ptq_cli.core.layer import Skipped
from ptq_cli.core.names import by_number
from ptq_cli.core.tensors import is_float
from ptq_cli.errors import InputError
from ptq_cli.models.linears import left_alone
from ptq_cli.plan.grid_settings import FLOAT_BITS, GridSettings
from ptq_cli.plan.tied_heads import refuse_lone_head, refuse_missing_head
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor


def choose_tensors(
    checkpoint: Checkpoint, settings: GridSettings
) -> tuple[list[StoredTensor], list[Skipped]]:
    """The tensors to quantize and those that are copied, layer 10 after layer 9."""
    ignore = _patterns("--ignore", settings.ignore, checkpoint)
    refuse_missing_head(checkpoint, settings.include)
    include = _patterns("--include", settings.include, checkpoint)
    rules = _patterns("[[layers]] match", [rule["match"] for rule in settings.layers], checkpoint)
    pairs = zip(rules, settings.layers, strict=True)
    ignore += [pattern for pattern, rule in pairs if rule.get("skip")]
    reasons = left_alone(checkpoint.specs, checkpoint.config)
    chosen, skipped = [], []
    for name in by_number(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        spec, reason = tensor.spec, reasons.get(name)
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
    refuse_lone_head(checkpoint, [tensor.spec.name for tensor in chosen])
    return chosen, skipped


def rule_of(settings: GridSettings, tensor: str) -> dict[str, Any]:
    """What the recipe's rules say of a tensor; a later rule wins over an earlier one."""
    matching = [rule for rule in settings.layers if re.search(rule["match"], tensor)]
    return {key: value for rule in matching for key, value in rule.items()}


def compiled(where: str, word: str) -> re.Pattern[str]:
    """A user's regular expression. Raises InputError where it is none."""
    try:
        return re.compile(word)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where} {word!r}: not a regular expression: {error}") from None


def _patterns(setting: str, words: Sequence[str], checkpoint: Checkpoint) -> list[re.Pattern[str]]:
    patterns = []
    for word in words:
        pattern = compiled(setting, word)
        if not any(pattern.search(name) for name in checkpoint.tensors):
            raise InputError(
                f"{setting} {word!r} matches no tensor of {checkpoint.path}",
                hint=f"names look like {next(iter(checkpoint.tensors), 'nothing')!r}",
            )
        patterns.append(pattern)
    return patterns
