"""What weights are that somebody quantized already, by config.json and by names and dtypes in the
headers: for those who bring them as a source, which only float weights are yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ptq_cli.core.tensors import DTYPE_BITS, FLOAT_DTYPES, TensorSpec

_METHODS = {  # config.json's `quant_method`, where people know it by another name
    "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8 (FBGEMM)", "mxfp4": "MXFP4",
    "mxfp8": "MXFP8", "nvfp4": "NVFP4", "modelopt": "Model Optimizer", "hqq": "HQQ",
    "quanto": "Quanto", "auto-round": "AutoRound", "aqlm": "AQLM", "vptq": "VPTQ", "spqr": "SpQR",
    "eetq": "EETQ", "bitnet": "BitNet", "higgs": "HIGGS", "quark": "Quark", "exl2": "EXL2",
}  # fmt: skip
_DETAILS = ("format", "quant_algo", "bnb_4bit_quant_type")  # what else config.json says
_DECLARATIONS = ("quantization_config", "quantization", "compression_config")

# Endings of names that only quantized weights have; the first that fits says what they are.
_NAMES = (
    ("bitsandbytes", r"\.(SCB|(nested_)?absmax|(nested_)?quant_map|quant_state\.\w+)"),
    ("GPTQ or AWQ", r"\.(qweight|qzeros|g_idx)"),
    ("HQQ", r"\.W_q"),
    ("Model Optimizer", r"\.weight_scale_2"),
    ("compressed-tensors", r"\.weight_(packed|zero_point|global_scale)"),
    ("Quanto", r"\.weight\._(data|scale|shift)"),
    ("torchao", r"\._\w+_qdata|\._weight_(scale|zero_point|scale_and_zero)"),
    ("AQLM", r"\.codebooks"),
    ("EXL2", r"\.q_weight"),
    ("EXL3", r"\.trellis"),
    ("QuIP#", r"\.Qidxs"),
    ("FP8", r"[._](weight_)?scale_inv"),
    ("FP8 or INT8", r"\.weight_scale"),
)
_PATTERNS = tuple((what, re.compile(f"{ending}$")) for what, ending in _NAMES)
_BLOCKS = re.compile(r"_blocks$")


def quantized_as(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> tuple[str, str] | None:
    """How a checkpoint is quantized, and the tensor that shows it ("": only config.json says so);
    None where its weights are float.

    ("FP8", "tensor 'layers.0.wq.weight' is F8_E4M3")
    """
    declared, seen = _declared(config), _seen(specs)
    if declared is None:
        return seen
    integers = (spec for spec in specs.values() if _is_integer_weight(spec))
    shown = next((f"tensor {spec.name!r} is {spec.dtype}" for spec in integers), "")
    return declared, shown if seen is None else seen[1]


def mlx_weights(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Weights packed as MLX does: they keep their name, and are words beside `.scales`."""
    return [
        name
        for name, spec in specs.items()
        if spec.dtype == "U32"
        and name.endswith(".weight")
        and name.removesuffix("weight") + "scales" in specs
    ]


def small_floats(specs: Mapping[str, TensorSpec]) -> list[TensorSpec]:
    """Tensors of floats of 8 bits or less."""
    floats = (spec for spec in specs.values() if spec.dtype.startswith("F"))
    return [spec for spec in floats if DTYPE_BITS[spec.dtype] <= 8]


def _declared(config: Mapping[str, Any]) -> str | None:
    """What config.json says, also for the text model of a multimodal one."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    found = [part[key] for part in parts for key in _DECLARATIONS if part.get(key)]
    if not found:
        return None
    if not isinstance(found[0], Mapping):
        return "what quantization_config says"
    method = found[0].get("quant_method")
    if method is None:
        return _without_method(found[0])
    details = [str(found[0][key]) for key in _DETAILS if isinstance(found[0].get(key), str)]
    bits = found[0].get("bits")
    details += [f"{bits} bits"] if isinstance(bits, int) else []
    named = _METHODS.get(str(method), str(method))
    return f"{named}, {', '.join(details)}" if details else named


def _without_method(settings: Mapping[str, Any]) -> str:
    if any(str(key).startswith(("load_in_", "bnb_")) for key in settings):
        return "bitsandbytes"
    if {"bits", "group_size", "mode"} <= settings.keys():
        return f"MLX, {settings['bits']} bits"
    return "what quantization_config says"


def _seen(specs: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """What the tensors are, and one that shows it."""
    for spec in small_floats(specs):
        what = "MX" if spec.dtype == "F8_E8M0" else f"FP{DTYPE_BITS[spec.dtype]}"
        return what, f"tensor {spec.name!r} is {spec.dtype}"
    for name, spec in specs.items():
        if _BLOCKS.search(name) and spec.dtype == "U8" and _BLOCKS.sub("_scales", name) in specs:
            return "MXFP4", f"tensor {name!r}"
    for what, pattern in _PATTERNS:
        found = next((name for name in specs if pattern.search(name)), None)
        if found is not None:
            return what, f"tensor {found!r}"
    for name in mlx_weights(specs):
        return "MLX", f"tensor {name!r}"
    scaled = {name.rpartition(".")[0] for name in specs if "scale" in name.rpartition(".")[2]}
    for name, spec in specs.items():
        if name.removesuffix(".weight") in scaled and _is_integer_weight(spec):
            return "integers with scales", f"tensor {name!r} is {spec.dtype}"
    return None


def _is_integer_weight(spec: TensorSpec) -> bool:
    return spec.name.endswith(".weight") and spec.dtype not in FLOAT_DTYPES
