"""Post-training quantization of language models, without torch and without a GPU.

The commands as functions:

>>> import ptq_cli
>>> report = ptq_cli.gptq("model.safetensors", bits=4, group_size=128)  # doctest: +SKIP
>>> weight = ptq_cli.load_weight("model-gptq-w4g128", "lm_head")  # doctest: +SKIP
"""

from ptq_cli._version import __version__

TYPE_CHECKING = False  # typing is slow to import, and the command answers signals after this
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "PtqError",
    "QuantizedLinear",
    "__version__",
    "allocate",
    "awq",
    "calibrate",
    "capture",
    "dequantize",
    "evaluate",
    "gptq",
    "inspect",
    "load_linear",
    "load_weight",
    "pack",
    "rtn",
    "smoothquant",
]

_HOME = {
    "PtqError": "ptq_cli.errors",
    "QuantizedLinear": "ptq_cli.models.forward.linear",
    "capture": "ptq_cli.calibration.from_torch",
}


def __getattr__(name: str) -> "Any":
    if name not in __all__:
        raise AttributeError(f"module 'ptq_cli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, "ptq_cli.commands.api")), name)


def __dir__() -> "list[str]":
    """The public names alone, whatever has been imported."""
    return list(__all__)
