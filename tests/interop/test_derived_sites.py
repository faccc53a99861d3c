"""Sites of architectures that no family here knows, derived from names and shapes, against the
memory that torch shows their linears."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import ptq_cli
from ptq_cli.models.detect import find_sites
from ptq_cli.models.recipe import recipe_sites
from ptq_cli.storage.sources import open_float

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
# Side by side behind one norm, a mixture, convolutions, words of their own, mixed inputs; and how
# many sites of several linears each has.
KINDS = {
    "Phi": 2, "Olmoe": 10, "Lfm2": 4, "GPTJ": 2, "Bert": 2, "Rwkv": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_derived_is_what_torch_shows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    auto = transformers.AutoModel if kind == "Bert" else transformers.AutoModelForCausalLM
    if kind == "GPTJ":
        config.rotary_dim = 8
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for values in model.parameters():  # none are equal by how they are initialized
            values.add_(0.05 * torch.randn_like(values))
    model.save_pretrained("model")
    with ptq_cli.capture(model, "model", "out.safetensors", sites="sites.toml"):
        model(torch.randint(3, 250, (2, 20)))
    checkpoint = open_float(Path("model"))
    named = tomllib.loads(Path("sites.toml").read_text())["sites"]
    seen = linears_of(recipe_sites(named, checkpoint.specs))
    reached = frozenset().union(*seen)
    found = find_sites(checkpoint.specs, checkpoint.config)
    assert found.family is None, "known by now: take another"
    derived = {group & reached for group in linears_of(found.sites)} - {frozenset()}
    assert {group for group in derived if len(group) > 1} == {g for g in seen if len(g) > 1}
    assert len([group for group in seen if len(group) > 1]) == KINDS[kind]


def linears_of(sites: Any) -> set[frozenset[str]]:
    return {frozenset(linear.module for linear in site.linears) for site in sites}
