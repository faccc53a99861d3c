"""Signatures of the functions of `commands/api.py` that take a method's settings by name."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter, Signature
from typing import Any

from ptq_cli.calibration.find import AnyPath, Paths
from ptq_cli.commands.budget import METHODS, NO_SETTINGS, TRIAL_TOKENS
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.core.report import RunReport
from ptq_cli.core.settings import default_of, settings_fields
from ptq_cli.plan.grid_settings import default_settings, settings_classes
from ptq_cli.registry import SMOOTHERS

Named = dict[str, tuple[Any, Any]]  # name -> (type, default)

# What the quantizing functions take besides settings.
WHERE: Named = {
    "output": (AnyPath | None, None),
    "runtime": (str | None, None),
    "fallback": (str, "error"),
}
SOURCE: Named = {
    "calibration": (AnyPath | None, None),
    "activations": (Paths, ()),
    "bf16": (bool, False),
    "tokens": (AnyPath | None, None),
    "text": (AnyPath | None, None),
    "chat": (AnyPath | None, None),
    "seq_len": (int | None, None),
    "nsamples": (int | None, None),
    "seed": (int | None, None),
    "mask": (AnyPath | None, None),
    "min_expert_tokens": (int | None, None),
    "parallel_layers": (bool, False),
    "require_calibration": (bool, False),
    "imatrix": (AnyPath | None, None),
}
RUN_OPTIONS: Named = {
    "force": (bool, False),
    "restart": (bool, False),
    "max_shard_size": (str | int | None, None),
    "listen": (Listener, nobody),
    "workers": (int | None, None),
    "max_memory": (str | int | None, None),
    "scheduler": (str | None, None),
}
# And these where a budget is shared out; `allocate` takes no other.
BUDGET: Named = {
    "target_bpw": (float | None, None),
    "target_size": (str | int | None, None),
    "choices": (str | Iterable[str], ()),
    "keep": (str | Iterable[str], ()),
    "fast": (bool, False),
    "trial_tokens": (int, TRIAL_TOKENS),
    "table": (AnyPath | None, None),
}
_NOT_OF_ALLOCATE = (
    *("parallel_layers", "require_calibration"),
    *("restart", "max_shard_size", "scheduler"),
)


def signature_of(command: str) -> Signature:
    """The signature of the function that a quantizing command is."""
    where, source = dict(WHERE), {} if command == "pack" else dict(SOURCE)
    if command in SMOOTHERS:  # these always need calibration
        del where["fallback"], source["require_calibration"]
    budget = BUDGET if command in METHODS else {}
    return _signature(_settings(command) | budget | where | source | RUN_OPTIONS, RunReport)


def allocate_signature() -> Signature:
    """The signature of `allocate`. Settings are GPTQ's; other methods have some of them."""
    settings = {name: own for name, own in _settings("gptq").items() if name not in NO_SETTINGS}
    settings["format"] = (str | None, None)
    where: Named = {"method": (str, "gptq"), "output": (AnyPath | None, None)}
    others = {k: v for k, v in (SOURCE | RUN_OPTIONS).items() if k not in _NOT_OF_ALLOCATE}
    return _signature(where | BUDGET | settings | others, dict[str, Any])


def _settings(command: str) -> Named:
    own = default_settings(command)
    return {
        field.name: (kind, own.get(field.name, default_of(field)))
        for field, kind in settings_fields(*settings_classes(command))
    }


def _signature(named: Named, result: Any) -> Signature:
    model = Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, annotation=AnyPath)
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in named.items()
    ]
    return Signature([model, *parameters], return_annotation=result)
