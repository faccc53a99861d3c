"""W8A8 from `ptq smoothquant`, loaded by transformers with compressed-tensors.

The reference is the float model with the dequantized weights whose inputs are rounded as the
library rounds them: per token `s = absmax / 127.5`, or the static scale of the file; `x' = clip(
round(x / s), −128, 127) · s`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ptq_cli.cli.main import run
from ptq_cli.storage.quantized import open_quantized

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "compressed_tensors"))),
        reason="needs the extra interop",
    ),
]
ROOT = Path(__file__).parent.parent.parent


def compared(folder: Path, source: Path) -> tuple[float, int]:
    """The error of transformers' logits over the largest of the reference, and the length of what
    it generates."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(3, 67).reshape(2, 32)
    opened = open_quantized(folder)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = plain.state_dict()
    for name in opened.untouched():
        if name in weights:
            weights[name] = torch.from_numpy(opened.checkpoint.read(name).astype("float32"))

    def rounded(module: Any, inputs: Any) -> Any:
        x = inputs[0]
        scale = module.input_scale or x.abs().amax(-1, keepdim=True) / 127.5
        return (torch.clamp(x / scale, -128, 127).round() * scale,)

    for name, module in plain.named_modules():
        if name in opened.layers:
            weight = opened.load(name)
            weights[name + ".weight"] = torch.from_numpy(weight.dequantized())
            module.input_scale = weight.input_scale
            module.register_forward_pre_hook(rounded)
    plain.load_state_dict(weights)
    with torch.no_grad():
        loaded, reference = model(tokens).logits, plain(tokens).logits
        made = model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False)
    return float((loaded - reference).abs().max() / reference.abs().max()), made.shape[1]


@pytest.mark.parametrize("scheme", ["dynamic-token", "static"])
@pytest.mark.parametrize("alpha", ["0.5"])
def test_logits_equal_those_of_rounded_inputs(tmp_path, scheme, alpha):
    source, out = ROOT / "sample_data", tmp_path / "out"
    options = ["--alpha", alpha, "--activation-scheme", scheme, "--format", "compressed-tensors"]
    assert run(["smoothquant", str(source), *options, "-o", str(out)]) == 0
    error, length = compared(out, source)
    assert error < 1e-5
    assert length == 7
