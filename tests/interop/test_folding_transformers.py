"""transformers' own logits before and after every site of a model is folded."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.models.detect import find_sites
from ptq_cli.numerics.smoothquant import tied
from tests.folds import fold_site

pytestmark = pytest.mark.interop

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOOM = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}
OPT = {
    "vocab_size": 50, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# (model_type, settings, sites of a block that are left alone)
CASES = [
    ("llama", SIZES, 0),
    ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}, 0),
    ("llama", SIZES | {"num_key_value_heads": 4}, 0),
    ("mistral", SIZES | {"sliding_window": 4}, 0),
    ("qwen2", SIZES, 0),
    ("qwen3", SIZES | {"head_dim": 16}, 0),
    ("gemma", SIZES | {"head_dim": 16}, 0),
    ("gemma2", SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16}, 0),
    ("gemma3_text", SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16}, 0),
    ("phi3", SIZES, 0),
    ("phi3", SIZES | {"num_key_value_heads": 4}, 0),
    ("opt", OPT, 0),
    ("opt", OPT | {"do_layer_norm_before": False, "activation_function": "gelu"}, 3),
    ("gpt2", GPT2, 1),
    ("bloom", BLOOM, 1),
    ("bloom", BLOOM | {"apply_residual_connection_post_layernorm": True}, 3),
]


@pytest.mark.parametrize(("kind", "settings", "left"), CASES)
def test_logits_do_not_change(kind, settings, left):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(3, 50, (2, 9))
    before = logits(model, tokens)
    tensors = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    folded, count = fold_everything(tensors, json.loads(config.to_json_string(use_diff=False)))
    assert count == 2 * (4 - left)
    model.load_state_dict({name: torch.from_numpy(a) for name, a in folded.items()})
    after = logits(model, tokens)
    assert not all(np.array_equal(folded[name], a) for name, a in tensors.items())
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)  # norms work in float32


def logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(tokens).logits.numpy()


def fold_everything(tensors, config):
    specs = {name: TensorSpec(name, "F64", array.shape) for name, array in tensors.items()}
    rng = np.random.default_rng(4)
    count = 0
    assert find_sites(specs).family is not None  # by names alone
    for site in find_sites(specs, config).sites:
        if site.feeder is not None:
            factors = np.exp2(rng.uniform(-4, 4, site.in_features)).astype(np.float32)
            changed, _, _ = fold_site(site, tensors, tied(factors, site.ties))
            tensors = {**tensors, **changed}
            count += 1
    return tensors, count
