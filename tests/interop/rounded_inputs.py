"""Inputs of linears, rounded to small floats as compressed-tensors rounds them in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptq_cli.core.grid import Activation
from ptq_cli.core.levels import SMALL_FLOATS
from ptq_cli.storage.quantized import QuantizedFolder


def round_inputs(model: Any, quantized: QuantizedFolder) -> None:
    """Let the linears of a model round their inputs as the folder says. (Of experts that are fused
    there are no modules, and the client does not round theirs.)"""
    for name, module in model.named_modules():
        layer = quantized.layers.get(name)
        inputs = None if layer is None else layer.activation
        if inputs is not None and inputs.levels != "integer":
            known = quantized.load(name).input_scale
            module.register_forward_pre_hook(_hook(inputs, known))


def _hook(inputs: Activation, known: float | None) -> Callable[[Any, Any], Any]:
    return lambda module, given: (_rounded(given[0], inputs, known), *given[1:])


def _rounded(x: Any, inputs: Activation, known: float | None) -> Any:
    """Levels times scales; with a global scale in float32, else in the dtype of x."""
    import torch

    largest = SMALL_FLOATS[inputs.levels].largest
    if not inputs.dynamic:
        assert known is not None
        scale = torch.tensor(known, dtype=x.dtype)
        return _nearest(x / scale, inputs.levels) * scale
    groups = x.unflatten(-1, (-1, inputs.group_size or x.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True)
    if inputs.scale_dtype == "e8m0":
        scale = _power_of_two(scale, 2 if inputs.bits == 4 else 8)
    elif inputs.scale_dtype == "e4m3":
        assert known is not None
        stored = ((scale / largest).float() * known).clamp(max=448).to(torch.float8_e4m3fn).float()
        scale = torch.where(stored == 0, 0.125, stored) / known
    else:
        scale = scale / largest
    return (_nearest(groups / scale, inputs.levels) * scale).flatten(-2).to(x.dtype)


def _power_of_two(absmax: Any, offset: int) -> Any:
    """2^(exponent of absmax, rounded at one bit of its mantissa, less the offset); of bfloat16."""
    import torch

    bits = absmax.to(torch.bfloat16).view(torch.int16).int() + (1 << 5)
    return torch.exp2(((bits >> 7 & 0xFF) - 127 - offset).to(absmax.dtype))


def _nearest(steps: Any, levels: str) -> Any:
    """The nearest level, ties to the even code; what is greater than all becomes the greatest."""
    import torch

    values = torch.from_numpy(SMALL_FLOATS[levels].values).double()
    half = values[: len(values) // 2]
    half = half[half.isfinite()]
    size = steps.abs().double().clamp(max=float(half[-1]))
    between = (half[1:] + half[:-1]) / 2
    code = torch.bucketize(size, between)  # a tie goes to the lower code here
    tie = size == torch.nn.functional.pad(between, (0, 1), value=-1.0)[code]
    code = code + (tie & (code % 2 == 1)).long()
    return torch.copysign(half[code], steps.double()).to(steps.dtype)
