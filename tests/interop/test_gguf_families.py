"""GGUF files of every family that has a place there, in llama.cpp: what it computes and how it cuts
text is what transformers does with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_cli.commands import api
from ptq_cli.models.families import FAMILIES
from ptq_cli.storage.quantized import open_quantized
from tests.interop import ggml
from tests.interop.tiny_models import _causal, _fill, _with_images

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "xllamacpp", "gguf"))),
        reason="needs the extra interop",
    ),
    pytest.mark.filterwarnings("ignore"),
]
FAMILY = {family.name: family for family in FAMILIES}
LENGTH, VOCABULARY = 64, 256
TOKENS = np.random.default_rng(0).integers(3, 250, LENGTH).tolist()
HEADS, ENDS = {"head_dim": 32}, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.2 * i for i in range(6)],
}  # fmt: skip
GEMMA_3 = {**HEADS, "num_hidden_layers": 6, "query_pre_attn_scalar": 32, "sliding_window": 16}


def _gpt2() -> Any:
    import transformers

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "cohere2": _causal("Cohere2", num_hidden_layers=4, sliding_window=16, logit_scale=0.5, **ENDS),
    "gemma": _causal("Gemma", **HEADS),
    "gemma2": _causal("Gemma2", **HEADS, query_pre_attn_scalar=32, sliding_window=16),
    "gemma3": _causal(
        "Gemma3", **GEMMA_3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    ),
    "gemma3 with images": _with_images(
        "Gemma3", GEMMA_3,
        {
            "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=250, boi_token_index=251, eoi_token_index=252,
    ),
    "glm4": _causal("Glm4", **HEADS, attention_bias=True, **ENDS),
    "gpt2": _gpt2,
    "granite": _causal(
        "Granite", embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.4,
        logits_scaling=2.0,
    ),
    "llama": _causal("Llama", **HEADS),
    "llama tied with biases": _causal(
        "Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama 3": _causal("Llama", rope_scaling=LLAMA3),
    "llama linear": _causal("Llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama yarn": _causal("Llama", rope_scaling=YARN),
    "mistral": _causal("Mistral", **HEADS, sliding_window=100),
    "mixtral": _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "mixtral stacked": _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmo2": _causal("Olmo2"),
    "olmo3": _causal("Olmo3", num_hidden_layers=4, sliding_window=16),
    "olmo3 yarn": _causal(
        "Olmo3", num_hidden_layers=4, sliding_window=16, rope_theta=5e5,
        rope_scaling={**YARN, "rope_theta": 5e5},
    ),
    "phi3": _causal("Phi3", pad_token_id=0, sliding_window=100),
    "phi3 short": _causal(
        "Phi3", partial_rotary_factor=0.75, tie_word_embeddings=True, pad_token_id=0,
        max_position_embeddings=1024, original_max_position_embeddings=512, rope_scaling=LONG,
    ),
    "phi3 long": _causal(
        "Phi3", partial_rotary_factor=0.75, pad_token_id=0, max_position_embeddings=256,
        original_max_position_embeddings=32, rope_scaling=LONG,
    ),
    "qwen2": _causal("Qwen2", tie_word_embeddings=True),
    "qwen2 yarn": _causal("Qwen2", rope_scaling=YARN),
    "qwen2_moe": _causal("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=96),
    "qwen3": _causal("Qwen3", **HEADS),
    "qwen3 yarn": _causal("Qwen3", **HEADS, rope_scaling={**YARN, "attention_factor": 1.3}),
    "qwen3_moe": _causal("Qwen3Moe", **HEADS, **EXPERTS, norm_topk_prob=True),
    "smollm3": _causal("SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], **ENDS),
    "starcoder2": _causal("Starcoder2"),
}  # fmt: skip


def saved(name: str, folder: Path, build: Callable[[], Any] | None = None) -> Any:
    """A model of random weights as its publisher would save it, read in float32. Its logits are
    small, and so is what llama.cpp changes by rounding inputs to 8 bits.

    build: makes another one than MODELS has of that family
    """
    import torch

    torch.manual_seed(0)
    model = (build or MODELS[name])().eval()
    _fill(model)
    with torch.no_grad():
        for own, values in model.named_parameters():
            if "norm" in own and name.startswith("gemma"):
                values.sub_(1)  # the gain is one more
        model.get_output_embeddings().weight.mul_(0.4)
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format="stacked" not in name)
    return type(model).from_pretrained(folder, dtype=torch.float32)  # frequencies unrounded


def with_decoded(model: Any, out: Path) -> Any:
    """The model with what this tool's decoder gives of the file, floats as GGUF has them."""
    import torch

    quantized, state = open_quantized(out), model.state_dict()
    places = dict(where_experts_are(state))
    for module, layer in quantized.layers.items():
        weight = torch.from_numpy(layer.as_stored(quantized.load(module).dequantized()))
        name = module if f"{module}.weight" in state else in_memory(module)
        (places.get(name) if name in places else state[f"{name}.weight"]).copy_(weight)
        places.pop(name, None)
    assert not places  # every expert is in the file
    return model


def in_memory(module: str) -> str:
    """A module's name in transformers."""
    name = module.replace("block_sparse_moe", "mlp")
    for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        name = name.removesuffix(old) + new if name.endswith(f".{old}") else name
    return name.replace("language_model.model.", "model.language_model.")


def where_experts_are(state: dict[str, Any]) -> Any:
    """Each expert's linears in the tensors of all that transformers has in memory."""
    for name, values in state.items():
        base, _, own = name.rpartition(".")
        for expert in range(len(values) if values.ndim == 3 and "experts" in base else 0):
            if own == "down_proj":
                yield f"{base}.{expert}.down_proj", values[expert]
            else:
                half = values.shape[1] // 2
                yield f"{base}.{expert}.gate_proj", values[expert, :half]
                yield f"{base}.{expert}.up_proj", values[expert, half:]


def logits_of_the_file_alone(out: Path, folder: Path) -> NDArray[np.float32]:
    """What transformers computes with the model folder that is made of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    copyfile(out / "model.gguf", folder / "alone.gguf")
    api.dequantize(folder / "alone.gguf", folder / "back", dtype="float32")
    kept = {"dtype": torch.float32, "pad_token_id": None}  # Phi-3's own is outside the vocabulary
    model = AutoModelForCausalLM.from_pretrained(folder / "back", **kept)
    return np.asarray(model(torch.tensor([TOKENS])).logits[0].detach().numpy())


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities(name: str, tmp_path: Path) -> None:
    import torch

    model, out = saved(name, tmp_path / "model"), tmp_path / "out"
    api.rtn(tmp_path / "model", bits=8, group_size=32, format="gguf", output=out)
    with torch.no_grad():
        logits = with_decoded(model, out)(torch.tensor([TOKENS])).logits[0].numpy()
    if FAMILY[name.partition(" ")[0]].gguf.model_class:
        again = logits_of_the_file_alone(out, tmp_path)
        np.testing.assert_allclose(again, logits, atol=1e-4 * np.abs(logits).max())
    ours = log_probabilities(logits)
    theirs = log_probabilities(ggml.logits(out / "model.gguf", TOKENS, VOCABULARY))
    worst, same = np.abs(ours - theirs).max(-1), (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(f"{name}: at most {worst.max():.4f} of a spread of {ours.std():.2f}, {same:.1%} top-1")
    # It rounds inputs to 8 bits. Where two experts are nearly as good that chooses the other, which
    # later tokens see.
    assert (worst < 0.1).mean() >= (0.5 if "moe" in name or "mixtral" in name else 1.0)
    assert ours.std() > 0.1


def test_every_family_is_there() -> None:
    held = {family.name for family in FAMILIES if family.gguf}
    assert held == {name.partition(" ")[0] for name in MODELS}
