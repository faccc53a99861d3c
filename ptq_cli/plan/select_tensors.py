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

IGNORED, KEPT_FLOAT = "ignored", f"bits = {FLOAT_BITS}"  # as the user wished


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
        if reason and possible and any(_matches(p, tensor) for p in include):
            reason = None
        if any(_matches(p, tensor) for p in ignore):
            reason = IGNORED
        if not reason and rule_of(settings, tensor).get("bits") == FLOAT_BITS:
            reason = KEPT_FLOAT
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
        if not any(_matches(pattern, tensor) for tensor in chosen):
            raise InputError(
                f"--include {pattern.pattern!r} matches no tensor that could be quantized in"
                f" {checkpoint.path}"
            )
    refuse_lone_head(checkpoint, [tensor.spec.name for tensor in chosen])
    return chosen, skipped


def rule_of(settings: GridSettings, tensor: StoredTensor) -> dict[str, Any]:
    """What the recipe's rules say of a tensor; a later rule wins over an earlier one."""
    matching = [rule for rule in settings.layers if _matches(re.compile(rule["match"]), tensor)]
    return {key: value for rule in matching for key, value in rule.items()}


def _matches(pattern: re.Pattern[str], tensor: StoredTensor) -> bool:
    """Whether a pattern names it, or the tensor of all experts that it is stored in."""
    whole = tensor.part_of
    return bool(pattern.search(tensor.spec.name) or (whole and pattern.search(whole.spec.name)))


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
        if not any(_matches(pattern, tensor) for tensor in checkpoint.tensors.values()):
            raise InputError(
                f"{setting} {word!r} matches no tensor of {checkpoint.path}",
                hint=f"names look like {next(iter(checkpoint.tensors), 'nothing')!r}",
            )
        patterns.append(pattern)
    return patterns
