"""ptq gptq --tokens on a model of each kind, loaded by transformers, which predicts more like the
float model than with plain rounding."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import ptq
from tests.interop.tiny_models import write_models

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not all(map(find_spec, ("torch", "transformers", "compressed_tensors"))),
        reason="needs the extra interop",
    ),
]

KINDS = {
    "latent attention": "deepseek_v3", "shared experts": "qwen2_moe", "sinks": "gpt_oss",
    "chunks": "llama4_text", "delta rule": "qwen3_next", "parallel branches": "cohere",
    "text of a model with images": "llava",
}  # fmt: skip
OPTIONS: dict[str, tuple[object, ...]] = {
    "gpt_oss": ("--on-misfit", "keep"),  # transformers reads its experts in floats only
    "qwen3_next": ("--bits", 6),  # with 4 its predictions are as good as lost, however rounded
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_models(folder, list(KINDS.values()))
    np.save(folder / "tokens.npy", np.random.default_rng(2).integers(3, 250, (16, 64)))
    return folder


def log_probabilities(folder: Path, tokens: Any) -> Any:
    import torch
    import transformers

    (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, found = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.log_softmax(dim=-1).double().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_it_predicts_better_than_plain_rounding(kind: str, models: Path, tmp_path: Path) -> None:
    name = KINDS[kind]
    tokens = np.random.default_rng(5).integers(3, 250, (8, 64))
    common = ("--group-size", 32, "--format", "compressed-tensors", *OPTIONS.get(name, ()))
    data = {"gptq": ("--tokens", models / "tokens.npy"), "rtn": ()}
    expected, found = log_probabilities(models / name, tokens), {}
    for command, own in data.items():
        outcome = ptq(command, models / name, "-o", tmp_path / command, *common, *own)
        assert outcome.code == 0, outcome.err
        difference = expected - log_probabilities(tmp_path / command, tokens)
        # the Kullback-Leibler divergence, in nats
        found[command] = (np.exp(expected) * difference).sum(axis=-1).mean()
    print(f"{kind}: {found['gptq']:.2e}, plain rounding {found['rtn']:.2e}")
    assert 0 < found["gptq"] < found["rtn"]
