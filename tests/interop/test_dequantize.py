"""Float models of quantized ones: what transformers itself makes of the same tensors, and what it
loads of the folders that `ptq dequantize` writes."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.builders import SAMPLE, ptq
from tests.foreign import FOREIGN, GATE_UP, Q, write_foreign

pytestmark = pytest.mark.interop
if not all(find_spec(name) for name in ("torch", "transformers")):
    pytest.skip("needs the extra interop", allow_module_level=True)


def dequantized(folder: Path, name: str):
    """The model, and what is written of it, as torch reads it."""
    from safetensors.torch import load_file

    model = FOREIGN[name]()
    write_foreign(folder / "m", model)
    assert ptq("dequantize", folder / "m", "-o", folder / "out").code == 0
    stored = load_file(folder / "m" / "model.safetensors")
    return model, stored, load_file(folder / "out" / "model.safetensors")


def test_experts_of_gpt_oss(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model, stored, found = dequantized(tmp_path, "gpt_oss")
    for name in model.weights:
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert found[name].dtype == theirs.dtype == torch.bfloat16
        assert torch.equal(found[name], theirs)
    assert found[GATE_UP].shape == (3, 32, 128)


@pytest.mark.parametrize(
    ("name", "scale"), [("hf_block", "weight_scale_inv"), ("deepseek_v4", "scale")]
)
def test_fp8_and_fp4_in_blocks(tmp_path, name, scale):
    """Transformers wants whole blocks; of 12 rows there is one and a half."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    model, stored, found = dequantized(tmp_path, name)
    theirs = Fp8Dequantize(None)
    for tensor in model.weights:
        weight, scales = stored[tensor], stored[f"{tensor.removesuffix('weight')}{scale}"]
        if tensor == f"{Q}.weight":
            weight, scales = weight[:8], scales[:1]
        whole = theirs._dequantize_one(weight, scales, torch.bfloat16)
        assert torch.equal(found[tensor][: len(whole)], whole)


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "NVFP4A16", "W4A16"])
def test_what_is_written_loads_as_any_float_model(tmp_path, scheme):
    """The logits are those of the same model with the decoded weights put into it."""
    import torch
    from transformers import AutoModelForCausalLM

    import ptq_cli

    source = tmp_path / "float"
    skip = shutil.ignore_patterns("activations")
    shutil.copytree(SAMPLE, source, ignore=skip)
    options = ("--group-size", 128) if scheme == "W4A16" else ()
    assert ptq("rtn", source, "--scheme", scheme, *options, "-o", tmp_path / "q").code == 0
    assert ptq("dequantize", tmp_path / "q", "-o", tmp_path / "out").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    twin = AutoModelForCausalLM.from_pretrained(source).eval()
    assert ours.dtype == twin.dtype == torch.bfloat16
    for name, values in twin.state_dict().items():
        if name.endswith("_proj.weight"):
            weight = ptq_cli.load_weight(tmp_path / "q", name.removesuffix(".weight"))
            values.copy_(torch.from_numpy(weight))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 2048, (2, 16)))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, twin(tokens).logits)
