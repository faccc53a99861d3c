"""Every family's forward against transformers' own, float32, on padded sequences.

The models are random and small; windows, rotary scalings and soft-caps are set so that they matter
within 64 tokens. Norm weights and biases are made random too: as initialised they are 1 and 0.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

SEQUENCES, LENGTH, VOCABULARY = 4, 64, 211
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {**SMALL, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 80,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 80, "word_embed_proj_dim": 64,
    "pad_token_id": 0,
}  # fmt: skip


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LONGROPE = rope(
    "longrope", short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[1.0 + 0.7 * i for i in range(8)],
)  # fmt: skip
LOCAL_GLOBAL = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama tied, biases": (
        "Llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "llama head_dim": ("Llama", {**SMALL, "head_dim": 24, "num_key_value_heads": 1}),
    "llama linear": ("Llama", {**SMALL, **rope("linear", factor=4.0)}),
    "llama dynamic": (
        "Llama", {**SMALL, "max_position_embeddings": 32, **rope("dynamic", factor=3.0)}
    ),
    "llama llama3": ("Llama", {**SMALL, **LLAMA3}),
    "llama yarn": ("Llama", {**SMALL, **YARN}),
    "llama yarn mscale": (
        "Llama",
        {**SMALL, **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.8,
                         mscale_all_dim=0.5, beta_fast=16, beta_slow=2, truncate=False)},
    ),
    "mistral window": ("Mistral", {**SMALL, "sliding_window": 11}),
    "qwen2": ("Qwen2", SMALL),
    "qwen2 window": (
        "Qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    "qwen2 yarn": ("Qwen2", {**SMALL, **YARN}),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 32}),
    "qwen3 window, biases": (
        "Qwen3",
        {**SMALL, "head_dim": 32, "use_sliding_window": True, "sliding_window": 7,
         "max_window_layers": 2, "attention_bias": True},
    ),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 7, **LOCAL_GLOBAL}),
    "gemma3 types, cap": (
        "Gemma3Text",
        {**GEMMA, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
         "final_logit_softcapping": 2.0},
    ),
    "phi3 window": ("Phi3", {**SMALL, "sliding_window": 13}),
    "phi3 partial": ("Phi3", {**SMALL, **rope("default", partial_rotary_factor=0.5)}),
    "phi3 longrope short": (
        "Phi3", {**SMALL, "original_max_position_embeddings": 64, **LONGROPE}
    ),
    "phi3 longrope long": ("Phi3", {**SMALL, "original_max_position_embeddings": 32, **LONGROPE}),
    "gpt2": ("GPT2", GPT2),
    "gpt2 scale, gelu": (
        "GPT2",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu",
         "n_inner": 96, "tie_word_embeddings": False},
    ),
    "opt": ("OPT", OPT),
    "opt 350m": ("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    "opt plain norms": (
        "OPT", {**OPT, "layer_norm_elementwise_affine": False, "enable_bias": False}
    ),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 5, "sliding_window": 11}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**SMALL, "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3,
         "moe_intermediate_size": 40, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3_moe window": (
        "Qwen3Moe",
        {**SMALL, "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2,
         "moe_intermediate_size": 40, "decoder_sparse_step": 2, "use_sliding_window": True,
         "sliding_window": 7},
    ),
}  # fmt: skip

OLD_KEYS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "gemma3": {"rope_theta": 5e5, "rope_local_base_freq": 2e3, "sliding_window_pattern": 2,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "phi3 partial": {"rope_theta": 5000.0, "partial_rotary_factor": 0.75},
}  # fmt: skip


def random_model(folder: Any, family: str, settings: dict[str, Any]) -> None:
    """Saves a random model of `family` in `folder`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    config.initializer_range = config.init_std = 0.15
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                kept = 1.0 if name.endswith("weight") and "gemma" not in family.lower() else 0.0
                tensor.copy_(kept + 0.2 * torch.randn_like(tensor))
            elif "gate.weight" in name:
                tensor.copy_(torch.randn_like(tensor))
    model.save_pretrained(folder)


def theirs(folder: Any, tokens: Any, mask: Any) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask))
    return output.logits.numpy()


def ours(folder: Any, tokens: Any, mask: Any) -> Any:
    from safetensors.numpy import load_file

    weights = load_file(os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        arch = read_architecture(json.load(file), weights)
    packing = pack(tokens.shape, mask)
    hidden = embed(arch, weights, tokens, packing)
    for index in range(len(arch.blocks)):
        hidden = forward_block(arch, index, weights, hidden, packing)
    scores = logits(arch, weights, finish(arch, weights, hidden))
    padded = np.zeros((*packing.mask.shape, scores.shape[1]), scores.dtype)
    padded[packing.mask] = scores
    return padded


def padded_batch() -> tuple[Any, Any]:
    """Tokens and mask: one full row, right padding, left padding, and both."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (SEQUENCES, LENGTH))
    mask = np.ones((SEQUENCES, LENGTH), dtype=np.int64)
    mask[1, 50:] = 0
    mask[2, :9] = 0
    mask[3, :5] = mask[3, 60:] = 0
    return np.where(mask == 1, tokens, 0), mask


def relative_error(folder: Any) -> float:
    tokens, mask = padded_batch()
    expected, found = theirs(folder, tokens, mask), ours(folder, tokens, mask)
    real = mask == 1
    return float(np.abs(found - expected)[real].max() / np.abs(expected[real]).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Any) -> None:
    random_model(tmp_path, *CASES[case])
    error = relative_error(tmp_path)
    print(f"{case}: {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("case", OLD_KEYS)
def test_the_keys_of_config_json_before_transformers_5(case: str, tmp_path: Any) -> None:
    random_model(tmp_path, *CASES[case])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        config.pop(key, None)
    path.write_text(json.dumps({**config, **OLD_KEYS[case]}))
    assert relative_error(tmp_path) < 1e-4


def with_partial_factor(config: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json that asks for half of each head's channels, itself or in its `rope_parameters`
    (Gemma 3 has some for each type of block)."""
    if where == "config.json":
        return {**config, "partial_rotary_factor": 0.5}
    given = config["rope_parameters"]
    if "rope_theta" in given:
        return {**config, "rope_parameters": {**given, "partial_rotary_factor": 0.5}}
    each = {kind: {**own, "partial_rotary_factor": 0.5} for kind, own in given.items()}
    return {**config, "rope_parameters": each}


@pytest.mark.parametrize("where", ["config.json", "rope_parameters"])
@pytest.mark.parametrize(
    "case",
    ["llama", "mistral window", "qwen2", "qwen3", "gemma2", "gemma3 types, cap", "phi3 window",
     "mixtral", "qwen3_moe"],
)  # fmt: skip
def test_a_partial_factor_counts_where_transformers_reads_it(
    case: str, where: str, tmp_path: Any
) -> None:
    random_model(tmp_path, *CASES[case])
    path = tmp_path / "config.json"
    changed = with_partial_factor(json.loads(path.read_text()), where)
    path.write_text(json.dumps(changed))
    assert relative_error(tmp_path) < 1e-4


@pytest.mark.parametrize("case", ["llama linear", "llama dynamic", "llama llama3", "qwen2 yarn"])
def test_a_partial_factor_that_transformers_cannot_run(case: str, tmp_path: Any) -> None:
    random_model(tmp_path, *CASES[case])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "partial_rotary_factor": 0.5}))
    tokens, mask = padded_batch()
    with pytest.raises(RuntimeError, match="size of tensor"):
        theirs(tmp_path, tokens, mask)
    with pytest.raises(InputError, match="partial_rotary_factor"):
        ours(tmp_path, tokens, mask)


PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
MATTERS: list[tuple[str, dict[str, Any]]] = [
    *((case, PLAIN) for case in CASES if case.split()[-1] in ("linear", "dynamic", "llama3")),
    *((case, PLAIN) for case in CASES if "yarn" in case or "longrope" in case),
    *((case, {"sliding_window": 1000}) for case in CASES if "window" in case),
    *((case, {"sliding_window": 1000}) for case in ("gemma2", "gemma3", "mixtral")),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 32}),
    ("gemma3", {**PLAIN}),
    ("gemma3 types, cap", {"layer_types": ["sliding_attention"] * 3}),
    ("phi3 partial", PLAIN),
    ("gpt2 scale, gelu", {"scale_attn_by_inverse_layer_idx": False}),
    ("qwen3_moe", {"norm_topk_prob": False}),
]


@pytest.mark.parametrize(("case", "change"), MATTERS)
def test_each_setting_matters_within_these_tokens(
    case: str, change: dict[str, Any], tmp_path: Any
) -> None:
    random_model(tmp_path, *CASES[case])
    tokens, mask = padded_batch()
    before = ours(tmp_path, tokens, mask)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    difference = np.abs(ours(tmp_path, tokens, mask) - before)[mask == 1].max()
    assert difference > 1e-3 * np.abs(before).max()
