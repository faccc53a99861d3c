"""Signatures of the quantizing functions, from the settings that their commands have."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any

from ptq_cli.calibration.find import AnyPath, Paths
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.core.report import RunReport
from ptq_cli.core.settings import settings_fields
from ptq_cli.plan.grid_settings import default_settings, settings_classes
from ptq_cli.registry import SMOOTHERS
from ptq_cli.storage.folder import MAX_SHARD

Options = dict[str, tuple[Any, Any]]  # name -> (type, default)

WHERE: Options = {
    "output": (AnyPath | None, None),
    "runtime": (str | None, None),
    "fallback": (str, "error"),
}
SOURCE: Options = {
    "calibration": (AnyPath | None, None),
    "activations": (Paths, ()),
    "bf16": (bool, False),
    "tokens": (AnyPath | None, None),
    "text": (AnyPath | None, None),
    "seq_len": (int | None, None),
    "nsamples": (int | None, None),
    "seed": (int | None, None),
    "mask": (AnyPath | None, None),
    "parallel_layers": (bool, False),
    "require_calibration": (bool, False),
}
RUN_OPTIONS: Options = {
    "force": (bool, False),
    "restart": (bool, False),
    "max_shard_size": (str | int, MAX_SHARD),
    "listen": (Listener, nobody),
    "workers": (int | None, None),
    "max_memory": (str | int | None, None),
    "scheduler": (str | None, None),
}


def signature_of(command: str) -> Signature:
    """The signature of the function that a quantizing command is."""
    where, source = dict(WHERE), {} if command == "pack" else dict(SOURCE)
    if command in SMOOTHERS:  # these always need calibration
        del where["fallback"], source["require_calibration"]
    own = default_settings(command)
    settings = {
        field.name: (kind, own.get(field.name, field.default))
        for field, kind in settings_fields(*settings_classes(command))
    }
    model = Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, annotation=AnyPath)
    named = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in (settings | where | source | RUN_OPTIONS).items()
    ]
    return Signature([model, *named], return_annotation=RunReport)
