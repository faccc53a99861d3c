"""Post-training quantization of language models, without torch and without a GPU.

The commands as functions:

>>> import ptq_cli
>>> report = ptq_cli.gptq("model.safetensors", bits=4, group_size=128)  # doctest: +SKIP
>>> weight = ptq_cli.load_weight("model-gptq-w4g128", "lm_head")  # doctest: +SKIP
"""

from importlib import import_module
from typing import Any

from ptq_cli._version import __version__

__all__ = [
    "PtqError",
    "QuantizedLinear",
    "__version__",
    "awq",
    "calibrate",
    "capture",
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
    "QuantizedLinear": "ptq_cli.linear",
    "capture": "ptq_cli.torch_capture",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ptq_cli' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "ptq_cli.api")), name)
