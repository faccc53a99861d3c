"""Every architecture in float64: transformers' logits from a checkpoint whose sites are all folded
are those of the checkpoint as it was."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.calibration.sites import model_sites
from ptq_cli.numerics.smoothquant import tied
from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import write_model
from tests.folds import fold_site
from tests.interop.tiny_models import _DELTA, _LATENT, ENDS, EXPERTS, HEADS, MODELS, _causal

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers"))), reason="needs the extra interop"
    ),
]

_SPARSE = {
    "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_KINDS = {
    "cohere_without_norms": _causal("Cohere", **ENDS),
    "cohere2": _causal("Cohere2", **ENDS),
    "deepseek_v3_lite": _causal("DeepseekV3", **{**_SPARSE, **_LATENT, "q_lora_rank": None}),
    "deepseek_v2": _causal("DeepseekV2", **_SPARSE, **_LATENT),
    "falcon_in_sequence": _causal("Falcon", multi_query=False, parallel_attn=False, bias=True),
    "falcon_two_norms": _causal("Falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_one_norm": _causal(
        "Falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon_relu": _causal("Falcon", multi_query=True, activation="relu"),
    "gpt_neox_in_sequence": _causal("GPTNeoX", use_parallel_residual=False, hidden_act="relu"),
    "olmo3": _causal("Olmo3"),
    "qwen2_moe_some_dense": _causal(
        "Qwen2Moe", **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=64,
        decoder_sparse_step=2,
    ),
    "qwen3_next_some_dense": _causal(
        "Qwen3Next", num_hidden_layers=4, **HEADS, **EXPERTS, **_DELTA, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, mlp_only_layers=[0, 3],
    ),
    "starcoder2_relu": _causal("Starcoder2", hidden_act="relu"),
}  # fmt: skip
# (sites, those that are left alone): of the whole model
LEFT = {
    "bamba": (8, 2), "bloom": (8, 2), "cohere": (6, 0), "cohere2": (6, 0),
    "cohere_without_norms": (6, 0), "deepseek_v2": (20, 0), "deepseek_v3": (20, 0),
    "deepseek_v3_lite": (18, 0), "falcon": (6, 2), "falcon_in_sequence": (8, 2),
    "falcon_one_norm": (6, 2), "falcon_relu": (6, 0), "falcon_two_norms": (8, 2),
    "gemma3": (24, 0), "gemma3n_text": (28, 16), "gpt2": (8, 2), "gpt_neox": (8, 2),
    "gpt_neox_in_sequence": (8, 0), "gpt_oss": (6, 2), "llama4_text": (8, 1), "mixtral": (14, 0),
    "mixtral_stacked": (14, 0), "qwen3_moe_stacked": (14, 0),
    "olmo2": (8, 4), "olmo3": (8, 4), "opt": (8, 0), "qwen2_moe": (16, 0),
    "qwen2_moe_some_dense": (12, 0), "qwen3_moe": (14, 0), "qwen3_next": (32, 3),
    "qwen3_next_some_dense": (24, 3), "smollm3": (16, 0), "starcoder2": (8, 2),
    "starcoder2_relu": (8, 0),
}  # fmt: skip
# Encoders with decoders have no sites that are known.
ALL = {**MODELS, **_KINDS}
ALL = {name: make for name, make in ALL.items() if name not in ("bart", "t5", "t5_v1_1")}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmaxes of transformers, which work in float32, stay in float64."""
    import torch

    cast, retype, softmax = torch.Tensor.to, torch.Tensor.type, torch.nn.functional.softmax

    def to(self: Any, *args: Any, **more: Any) -> Any:
        if self.dtype == torch.float64 and torch.float32 in (*args, *more.values()):
            return self
        return cast(self, *args, **more)

    def as_type(self: Any, *args: Any, **more: Any) -> Any:
        return to(self, *args) if torch.float32 in args else retype(self, *args, **more)

    def keep(inputs: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        return softmax(inputs, dim)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "type", as_type)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: to(self, torch.float32))
    monkeypatch.setattr(torch.nn.functional, "softmax", keep)


@pytest.mark.parametrize("name", ALL)
def test_a_folded_checkpoint_computes_the_same(tmp_path: Path, wide: None, name: str) -> None:
    import torch

    torch.manual_seed(0)
    model = ALL[name]().to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "before")
    checkpoint = open_checkpoint(tmp_path / "before")
    tensors = {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}
    sites = model_sites(checkpoint).sites
    left = sum(site.feeder is None for site in sites)
    assert (len(sites), left) == LEFT.get(name, (8, 0))
    assert all(site.reason for site in sites if site.feeder is None)
    assert not any(site.missing for site in sites)
    folded = fold_everything(sites, tensors)
    (tmp_path / "after").mkdir()
    write_model(tmp_path / "after" / "model.safetensors", folded)
    config = json.loads((tmp_path / "before" / "config.json").read_text())
    (tmp_path / "after" / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(3, 240, (2, 9))
    before, after = (
        logits(type(model), tmp_path / folder, tokens) for folder in ("before", "after")
    )
    assert np.abs(after - before).max() < 1e-9 * np.abs(before).max()


def fold_everything(sites: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    for site in sites:
        if site.feeder is not None:
            factors = np.exp2(rng.uniform(-3, 3, site.in_features)).astype(np.float32)
            changed, _, _ = fold_site(site, tensors, tied(factors, site.ties))
            assert not any(np.array_equal(changed[name], tensors[name]) for name in changed)
            tensors = {**tensors, **changed}
    return tensors


def logits(kind: Any, folder: Path, tokens: Any) -> Any:
    import torch

    model, found = kind.from_pretrained(
        folder,
        dtype=torch.float64,
        output_loading_info=True,
        experts_implementation="eager",  # grouped products know no float64
    )
    assert (found["missing_keys"], found["unexpected_keys"]) == (set(), set())
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.numpy()
