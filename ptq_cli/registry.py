"""Names of plug-ins: a new method or format is one file and one line here.

Plug-ins are imported when they are asked for, so that `ptq --help` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from ptq_cli.core.plugins import Format, Method, Smoother
from ptq_cli.errors import InputError

METHODS = {
    "rtn": "ptq_cli.methods.rtn:METHOD",
    "gptq": "ptq_cli.methods.gptq:METHOD",
    "awq": "ptq_cli.methods.awq:METHOD",
}

SMOOTHERS = {
    "smoothquant": "ptq_cli.methods.smoothquant:SMOOTHER",
    "awq": "ptq_cli.methods.awq:SMOOTHER",
}

FORMATS = {
    "ptq": "ptq_cli.formats.ptq:FORMAT",
    "gptq": "ptq_cli.formats.gptq:FORMAT",
    "gptq_v2": "ptq_cli.formats.gptq:FORMAT_V2",
    "awq": "ptq_cli.formats.awq:FORMAT",
    "compressed-tensors": "ptq_cli.formats.compressed_tensors:FORMAT",
    "fp8": "ptq_cli.formats.fp8:FORMAT",
    "mlx": "ptq_cli.formats.mlx:FORMAT",
    "gguf": "ptq_cli.formats.gguf:FORMAT",
    "onnx": "ptq_cli.formats.onnx:FORMAT",
}


def method(name: str) -> Method:
    """The method of that name. Raises InputError where there is none."""
    return cast(Method, _load(METHODS, "method", name))


def smoother(name: str) -> Smoother:
    """The smoother of that name. Raises InputError where there is none."""
    return cast(Smoother, _load(SMOOTHERS, "smoother", name))


def format_named(name: str) -> Format:
    """The format of that name. Raises InputError where there is none."""
    return cast(Format, _load(FORMATS, "format", name))


def _load(table: dict[str, str], kind: str, name: str) -> Any:
    if name not in table:
        raise InputError(f"unknown {kind} {name!r}", hint=f"known: {', '.join(table)}")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
