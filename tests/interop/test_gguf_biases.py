"""A Llama with biases as a GGUF file: transformers computes what it holds once it is told of the
biases, and drops them otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("mlp", [False, True])
def test_logits_with_biases(mlp: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=mlp)
    model = transformers.LlamaForCausalLM(config).half()
    for name, values in model.named_parameters():
        torch.nn.init.normal_(values, std=1.0 if name.endswith("bias") else 0.1)
    folder, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(folder)
    options = ["-b", 8, "-g", 32, "--format", "gguf", "-o", out]
    assert ptq("pack", folder, *options).code == 0
    model, quantized = model.float(), open_quantized(out)
    state = model.state_dict()
    for module in quantized.layers:
        state[f"{module}.weight"].copy_(torch.from_numpy(quantized.load(module).dequantized()))
    ids = torch.arange(20)[None]
    expected = model(ids).logits

    def error(**more: Any) -> float:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            out, gguf_file="model.gguf", dtype=torch.float32, **more
        )
        return float((loaded(ids).logits - expected).norm() / expected.norm())

    assert error(config=transformers.AutoConfig.from_pretrained(out)) < 1e-6
    assert error() > 0.1  # what `ptq check` warns of
