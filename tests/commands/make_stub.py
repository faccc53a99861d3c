"""Writes ptq_cli/__init__.pyi: `python -m tests.commands.make_stub`."""

from __future__ import annotations

import inspect
from typing import Any

import ptq_cli
from ptq_cli.commands import api
from tests.builders import ROOT

TARGET = ROOT / "ptq_cli" / "__init__.pyi"
QUANTIZING = ("awq", "gptq", "pack", "rtn", "smoothquant")
BY_NAME = ("allocate", *QUANTIZING)  # whose signatures are made from settings
HEAD = '''\
# Made by `python -m tests.commands.make_stub`; a test compares.
"""Post-training quantization of language models, without torch and without a GPU."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

from ptq_cli._version import __version__ as __version__
from ptq_cli.calibration.from_torch import capture as capture
from ptq_cli.commands.api import calibrate as calibrate
from ptq_cli.commands.api import dequantize as dequantize
from ptq_cli.commands.api import evaluate as evaluate
from ptq_cli.commands.api import inspect as inspect
from ptq_cli.commands.api import load_linear as load_linear
from ptq_cli.commands.api import load_weight as load_weight
from ptq_cli.core.progress import Progress
from ptq_cli.core.report import RunReport
from ptq_cli.errors import PtqError as PtqError
from ptq_cli.models.forward.linear import QuantizedLinear as QuantizedLinear
'''


def word(kind: Any) -> str:
    """A type as the stub has it."""
    text = kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)
    for module in ("collections.abc.", "typing.", "os.", "ptq_cli.core.progress."):
        text = text.replace(module, "")
    return text.replace("NoneType", "None")


def value(default: Any) -> str:
    return "..." if callable(default) else repr(default).replace("'", '"')


def function(name: str) -> str:
    signature = inspect.signature(getattr(api, name))
    model, *named = signature.parameters.values()
    lines = [f"    {p.name}: {word(p.annotation)} = {value(p.default)}," for p in named]
    return "\n".join(
        [
            f"def {name}(",
            f"    {model.name}: {word(model.annotation)},",
            "    *,",
            *lines,
            f") -> {word(signature.return_annotation)}: ...",
        ]
    )


def stub() -> str:
    names = "".join(f'    "{name}",\n' for name in ptq_cli.__all__)
    functions = "\n".join(map(function, BY_NAME))
    return f"{HEAD}\n__all__ = [\n{names}]\n\n{functions}\n"


if __name__ == "__main__":
    TARGET.write_text(stub(), "utf-8")
